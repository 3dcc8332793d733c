"""Payload log: large requests and results, written once, beside the rows that name them.

A row keeps the location of a large content: segment, offset, size and digest. The content is
durable before the row is queued, so a row never names what a power cut can take. What a crash
leaves behind the last row that was committed is named by no row, and goes with its segment.

`log` is the seam, `segments` keeps the log in files, `records` is their format, and `contents`
moves the contents of operations in and out.
"""
