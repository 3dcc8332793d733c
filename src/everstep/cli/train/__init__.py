"""``everstep train``."""
