"""A client's connections end with it, whether it was closed or dropped."""

from __future__ import annotations

import gc
import warnings

import everstep
from everstep.client._transport import http
from tests.client.fake_service import GIVE_UP_SECONDS, FakeService
from tests.waiting import eventually


def test_dropped_client_closes_its_connections(fake: FakeService) -> None:
    client = everstep.ServiceClient(base_url=fake.url, api_key="tml-test")
    client.create_rest_client().get_server_capabilities().result(GIVE_UP_SECONDS)
    pool = client.holder.http._client
    assert not pool.is_closed
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        del client
        gc.collect()
        eventually("the pool's end", lambda: pool.is_closed)


def test_address_is_parsed_once(fake: FakeService) -> None:
    with everstep.ServiceClient(base_url=fake.url, api_key="tml-test") as client:
        rest = client.create_rest_client()
        rest.get_server_capabilities().result(GIVE_UP_SECONDS)
        before = http._parsed.cache_info()
        for _ in range(3):
            rest.get_server_capabilities().result(GIVE_UP_SECONDS)
    after = http._parsed.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (3, 0)
