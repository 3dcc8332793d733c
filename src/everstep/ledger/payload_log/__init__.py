"""Payload log: large requests and results, written once, beside the rows that name them.

A row keeps the location of a large content: segment, offset, size and digest. A content is durable
before its row is queued, so no committed row names a content that a power cut can take. A crash may
leave contents that no row names; they are removed with their segment.

`log` is the seam, `segments` keeps the log in files, `records` is their format, `contents` moves
the contents of operations in and out, and `compaction` bounds what is kept of them.
"""
