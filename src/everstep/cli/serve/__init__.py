"""``everstep serve``."""
