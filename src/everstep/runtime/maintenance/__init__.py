"""Vault maintenance: garbage collection, pruning, scrubbing."""
