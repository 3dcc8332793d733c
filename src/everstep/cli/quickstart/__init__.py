"""``everstep quickstart``."""
