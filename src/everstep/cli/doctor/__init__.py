"""``everstep doctor``."""
