"""A service's address: refused with the reason where no request could go."""

from __future__ import annotations

import pytest

from everstep.client._transport.errors import TinkerError
from everstep.client._transport.http import Http

ODD = [
    "http://::1:8055",
    "http://h/?a=b",
    "http://h#x",
    "h:8055",
    "ftp://h",
    "http://",
    "http://h:x",
]


@pytest.mark.parametrize("address", ODD)
def test_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(TinkerError, match="is not the address of a service"):
        Http(address, None)
