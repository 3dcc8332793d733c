"""``everstep run``."""
