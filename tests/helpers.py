"""Helper processes: long-lived processes that outlive the test that started them.

`tests/conftest.py` checks that a test leaves no process behind; those registered here stay.
"""

from __future__ import annotations

KEPT: set[int] = set()
"""Process ids."""
