"""``everstep conformance``."""
