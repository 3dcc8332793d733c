"""Sampling: batches, sequences, token choice, the prefix cache."""
