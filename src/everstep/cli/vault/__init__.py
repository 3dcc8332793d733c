"""``everstep vault``."""
