"""Codecs: protobuf, arrays, compressed bodies."""

PROTOBUF = "application/x-protobuf"
