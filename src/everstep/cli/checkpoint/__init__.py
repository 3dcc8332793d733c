"""``everstep checkpoint``."""
