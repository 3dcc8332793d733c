"""``everstep mirror``."""
