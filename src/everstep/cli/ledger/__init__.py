"""``everstep ledger``."""
