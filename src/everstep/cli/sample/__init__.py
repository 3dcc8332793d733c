"""``everstep sample``."""
