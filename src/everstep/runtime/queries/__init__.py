"""Read-only queries: runs, sessions, audit log, traces."""
