"""Requests and responses of the protocol, one module a topic."""
