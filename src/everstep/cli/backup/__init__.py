"""``everstep backup``."""
