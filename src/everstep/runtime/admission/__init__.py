"""Admission: validate a request and build the operation that the ledger appends."""
