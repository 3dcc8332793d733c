"""Offload: large bodies and results are computed in a process of their own.

Decoding 64 MiB takes the interpreter's lock for seconds. In a thread it would keep the event loop
from answering anyone else.
"""
