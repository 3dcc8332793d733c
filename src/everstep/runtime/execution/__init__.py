"""Execution: run operations in order, record results, recover runs."""
