"""Checkpoints of a service: catalog, metadata, copies, imports, downloads."""
