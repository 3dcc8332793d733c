"""Collection while others save: it takes nothing that a checkpoint names, or is about to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from everstep.vault import Vault
from everstep.vault.local import LocalStorage
from tests.vault.checkpoints import RUN, draft, load, save

FILES = {"a": b"content"}


class Interrupted:
    """A storage that lets someone else act just before one of its calls."""

    def __init__(self, storage: Any, call: str, act: Callable[[], object]) -> None:
        self._storage = storage
        self._call = call
        self._act: Callable[[], object] | None = act

    def __getattr__(self, name: str) -> Any:
        if name == self._call and self._act is not None:
            act, self._act = self._act, None
            act()
        return getattr(self._storage, name)


def collect_while(vault: Vault, call: str, act: Callable[[], object]) -> None:
    vault._storage = Interrupted(vault._storage, call, act)  # type: ignore[assignment]
    vault.collect(0)


@pytest.mark.parametrize("call", ["keys", "sync"])
@pytest.mark.parametrize("stored_before", [True, False])
def test_a_save_during_a_collection_is_kept(
    anywhere: Vault, call: str, stored_before: bool
) -> None:
    if stored_before:
        anywhere.put([FILES["a"]])
    collect_while(anywhere, call, lambda: save(anywhere, "x", FILES))
    assert load(anywhere, anywhere.manifest("training", RUN, "x")) == FILES


def test_a_fork_during_a_collection_is_kept(anywhere: Vault) -> None:
    first = save(anywhere, "x", FILES)
    anywhere.delete("training", RUN, "x")
    collect_while(anywhere, "sync", lambda: anywhere.commit(draft("y", first.files)))
    assert load(anywhere, anywhere.manifest("training", RUN, "y")) == FILES


def test_a_save_that_is_still_going_on_is_kept(anywhere: Vault) -> None:
    with anywhere.pinned():
        refs = {"a": anywhere.put([FILES["a"]])}
        assert anywhere.collect(0) == []
        anywhere.commit(draft("x", refs))
    assert anywhere.collect(0) == []
    assert load(anywhere, anywhere.manifest("training", RUN, "x")) == FILES


def test_pins_end_with_what_pinned(anywhere: Vault) -> None:
    with pytest.raises(RuntimeError), anywhere.pinned():
        anywhere.put([b"x"])
        raise RuntimeError
    assert [ref.size for ref in anywhere.collect(0)] == [1]


def test_young_files_stay(anywhere: Vault) -> None:
    anywhere.put([b"x"])
    assert anywhere.collect() == []
    assert len(anywhere.collect(0)) == 1


def test_savers_deleters_and_collectors_at_the_same_time(anywhere: Vault) -> None:
    faults: list[BaseException] = []
    saved = threading.Event()

    def saver(number: int) -> Iterator[None]:
        for step in range(30 if isinstance(anywhere.storage, LocalStorage) else 6):
            files = {"own": b"%d" % number, "shared": b"shared", "step": b"%d" % (step % 3)}
            manifest = save(anywhere, f"n{number}", files, step=step, overwrite=True)
            assert load(anywhere, manifest) == files
            if step % 3 == 0:
                anywhere.delete("training", RUN, f"n{number}")
            yield

    def collector() -> Iterator[None]:
        while not saved.is_set():
            anywhere.collect(0)
            yield

    def run(work: Iterator[None]) -> None:
        try:
            for _ in work:
                pass
        except BaseException as error:  # noqa: BLE001  told below
            faults.append(error)

    savers = [threading.Thread(target=run, args=(saver(number),)) for number in range(3)]
    collectors = [threading.Thread(target=run, args=(collector(),)) for _ in range(2)]
    for thread in savers + collectors:
        thread.start()
    for thread in savers:
        thread.join()
    saved.set()
    for thread in collectors:
        thread.join()
    assert faults == []
    for manifest in anywhere.manifests():
        load(anywhere, manifest)
