"""``everstep session``."""
