"""The ledger on SQLite: connection, group commit, checksums, copies."""
