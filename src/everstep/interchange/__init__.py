"""Interchange: exports and imports adapters and models in other tools' formats.

Export merges an adapter into its base model shard by shard, writes model cards and reports the
limits of inference servers. Import reads adapters from other sources as untrusted input. The room
handles files and arrays and uses neither torch, HTTP, databases nor the vault.
"""
