"""Interchange: adapters and models in the formats of others, out and in.

Out: an adapter merged into its base model shard by shard, the card that tells where it comes from,
what inference servers can't take. In: an adapter that somebody else made, read as what it is, input
that nobody has checked. Knows nothing of torch, HTTP, databases or the vault: files and arrays.
"""
