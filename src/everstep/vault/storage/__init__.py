"""Storage backends of the vault: a directory or an object store."""
