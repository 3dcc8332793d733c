"""Integrity: reads a whole ledger, every row with its contents, and says what is damaged."""

from __future__ import annotations

from functools import partial
from typing import Any

from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.payload_log.contents import Contents
from everstep.ledger.store import Store


async def find_damaged_rows(store: Store, contents: Contents) -> list[str]:
    """Return a message for each row that is damaged, or whose request or result is.

    Args:
        store: the database.
        contents: large requests and results.
    """
    found: list[str] = []
    for table in t.CHECKSUMMED:
        last: Any = None
        while True:
            page = await store.read(partial(q.check_page, table=table, after=last))
            found += page.damaged + await contents.damaged(page.logged)
            last = page.last
            if last is None:
                break
    return found
