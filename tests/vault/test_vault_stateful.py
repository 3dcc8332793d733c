"""The vault against a model of it, through errors, kills and power cuts at any system call."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from everstep.vault import (
    CheckpointDamaged,
    CheckpointExists,
    CheckpointNotFound,
    FileRef,
    Vault,
)
from everstep.vault.keys import blob_key, digest_of, manifest_key
from tests.buckets.bucket import Bucket
from tests.vault.checkpoints import draft, halves, load, save
from tests.vault.disk import Dead, Death, Disk

Key = tuple[str, str, str]
State = tuple[int, dict[str, bytes]] | None  # step, files

keys = st.tuples(
    st.sampled_from(["training", "sampler"]), st.sampled_from(["r:0", "r:1"]), st.just("x")
)
bytes_of_files = st.sampled_from([b"", b"a", b"shared", b"\0" * 3000, b"other"])
contents = st.dictionaries(st.sampled_from(["adapter", "optimizer"]), bytes_of_files, min_size=1)
falls = st.none() | st.tuples(st.integers(0, 30), st.sampled_from(["kill", "power cut", "error"]))
numbers = st.integers(0, 30)


class VaultMachine(RuleBasedStateMachine):
    """Rules do the same to a vault and to its model.

    The model knows what is listed. What died unacknowledged is found by reading, and has to be
    one of the states that it may be in; until it is known to be durable, a power cut may turn it
    into another of them.
    """

    @initialize()
    def begin(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="everstep-vault-"))
        self.disk: Any = self.new_disk()
        self.disk.__enter__()
        self.listed: dict[Key, State] = {}
        self.unsure: dict[Key, list[State]] = {}
        self.step = 0
        self.vault = self.open()

    def new_disk(self) -> Any:
        return Disk(self.base)

    def open(self) -> Vault:
        """What a new process has."""
        return Vault(self.disk.home / "vault")

    def files(self, prefix: str) -> list[str]:
        """Keys of the files that lie there, whatever the vault says."""
        root = self.disk.home / "vault"
        found = (root / prefix).rglob("*")
        return [path.relative_to(root).as_posix() for path in found if path.is_file()]

    def flipped(self, key: str, place: float, bit: int) -> Any:
        """Have a bit of a file be another one, for a while."""
        path = self.disk.home / "vault" / key
        return flipped(path.read_bytes, path.write_bytes, place, bit)

    def teardown(self) -> None:
        self.disk.__exit__()
        shutil.rmtree(self.base)

    def attempt(self, work: Callable[[], object], fall: tuple[int, Death] | None) -> bool:
        """Whether work was acknowledged; after a death a new process has taken over."""
        if fall is None:
            work()
            return True
        self.disk.fall(*fall)
        try:
            work()
        except Dead:
            self.disk.restart(fall[1])
            self.vault = self.open()
            return False
        except OSError:
            return False
        finally:
            self.disk.stand()
        return True

    def change(
        self, key: Key, new: State, work: Callable[[], object], fall: tuple[int, Death] | None
    ) -> None:
        may_be = [*self.unsure.get(key, []), self.listed.get(key), new]
        if self.attempt(work, fall):
            may_be = [new]
        self.unsure[key] = may_be
        if fall is not None and fall[1] == "power cut":
            self.look()
        else:
            self.look(key)

    def look(self, *wanted: Key) -> None:
        """Find out what became of what was not acknowledged."""
        for key in wanted or list(self.unsure):
            found = self.found(key)
            assert found in self.unsure[key]
            self.listed[key] = found
            if not wanted or len(self.unsure[key]) == 1:
                del self.unsure[key]

    def found(self, key: Key) -> State:
        try:
            manifest = self.vault.manifest(*key)
        except CheckpointNotFound:
            return None
        return manifest.step, load(self.vault, manifest)

    # Saves

    @rule(key=keys, files=contents, overwrite=st.booleans(), fall=falls)
    def save(
        self, key: Key, files: dict[str, bytes], overwrite: bool, fall: tuple[int, Death] | None
    ) -> None:
        kind, run, name = key
        self.step += 1

        def work() -> None:
            save(self.vault, name, files, kind=kind, run=run, step=self.step, overwrite=overwrite)

        if self.listed.get(key) is not None and not overwrite:
            with pytest.raises(CheckpointExists, match=name):
                work()
        else:
            self.change(key, (self.step, files), work, fall)

    @rule(key=keys, files=contents)
    def save_while_collecting(self, key: Key, files: dict[str, bytes]) -> None:
        kind, run, name = key
        self.step += 1
        with self.vault.pinned():
            refs = {}
            for file, content in files.items():
                refs[file] = self.vault.put(halves(content))
                assert self.vault.collect(0) == []
            manifest = draft(name, refs, kind=kind, run=run, step=self.step)
            self.vault.commit(manifest, overwrite=True)
            assert self.vault.collect(0) == []
        self.unsure[key] = [(self.step, files)]
        self.look(key)

    @precondition(lambda self: any(self.listed.values()))
    @rule(index=numbers, key=keys)
    def fork(self, index: int, key: Key) -> None:
        known = [key for key, state in sorted(self.listed.items()) if state is not None]
        source = self.vault.manifest(*known[index % len(known)])
        self.step += 1
        kind, run, name = key
        state = (self.step, load(self.vault, source))
        copy = draft(name, source.files, kind=kind, run=run, step=self.step)
        self.change(key, state, lambda: self.vault.commit(copy, overwrite=True), None)

    @rule(key=keys)
    def commit_what_was_not_put(self, key: Key) -> None:
        kind, run, name = key
        nothing = draft(name, {"lost": FileRef(blake3="0" * 64, size=1)}, kind=kind, run=run)
        with pytest.raises(CheckpointDamaged, match="lost"):
            self.vault.commit(nothing, overwrite=True)

    @rule(content=bytes_of_files, fall=falls)
    def put_for_nothing(self, content: bytes, fall: tuple[int, Death] | None) -> None:
        if not self.attempt(lambda: self.vault.put([content]), fall) and fall is not None:
            self.after_a_fall(fall[1])

    def after_a_fall(self, death: Death) -> None:
        if death == "power cut":
            self.look() if self.unsure else None

    # Deletion, collection

    @rule(key=keys, fall=falls)
    def delete(self, key: Key, fall: tuple[int, Death] | None) -> None:
        there = self.listed.get(key) is not None
        answers: list[bool] = []
        if not there and self.unsure.get(key):
            return  # a deletion of what is gone promises nothing
        self.change(key, None, lambda: answers.append(self.vault.delete(*key)), fall)
        assert answers in ([], [there])

    @rule(fall=falls)
    def collect(self, fall: tuple[int, Death] | None) -> None:
        if self.attempt(lambda: self.vault.collect(0), fall):
            self.unsure.clear()  # a collection makes what it saw durable
            assert self.blobs() == self.reachable()
        elif fall is not None:
            self.after_a_fall(fall[1])

    def blobs(self) -> set[str]:
        return {digest_of(key) for key in self.files("blobs")}

    def reachable(self) -> set[str]:
        return {ref.blake3 for m in self.vault.manifests() for ref in m.files.values()}

    # Other processes, other hands

    @rule()
    def reopen(self) -> None:
        self.vault = self.open()

    @rule()
    def power_cut(self) -> None:
        self.disk.restart("power cut")
        self.vault = self.open()
        self.after_a_fall("power cut")

    @precondition(lambda self: any(self.listed.values()))
    @rule(index=numbers)
    def export(self, index: int) -> None:
        key, state = self.pick(index)
        directory = self.base / "export"
        paths = self.vault.export(self.vault.manifest(*key), directory)
        assert state is not None
        assert {path.name: path.read_bytes() for path in paths} == state[1]
        assert len(list(directory.iterdir())) == len(paths)
        shutil.rmtree(directory)

    @precondition(lambda self: any(self.listed.values()))
    @rule(index=numbers, place=st.floats(0, 0.999), bit=st.integers(0, 7))
    def corrupt_a_manifest(self, index: int, place: float, bit: int) -> None:
        (kind, run, name), _ = self.pick(index)
        with self.flipped(manifest_key(kind, run, name), place, bit):
            for ask in (
                lambda: self.vault.manifest(kind, run, name),
                lambda: list(self.vault.manifests()),
                lambda: self.vault.collect(0),
            ):
                with pytest.raises(CheckpointDamaged, match=f"{run}/{kind}/{name}"):
                    ask()

    @precondition(lambda self: any(self.listed.values()))
    @rule(index=numbers, place=st.floats(0, 0.999), bit=st.integers(0, 7))
    def corrupt_a_file(self, index: int, place: float, bit: int) -> None:
        key, state = self.pick(index)
        manifest = self.vault.manifest(*key)
        assert state is not None
        file = sorted(manifest.files)[index % len(manifest.files)]
        ref = manifest.files[file]
        if not ref.size:
            return
        with self.flipped(blob_key(ref.blake3), place, bit):
            with pytest.raises(CheckpointDamaged, match=file):
                self.vault.read(manifest, file)
            with pytest.raises(CheckpointDamaged):
                self.vault.export(manifest, self.base / "never")
            assert not (self.base / "never").exists()

    def pick(self, index: int) -> tuple[Key, State]:
        known = [(key, state) for key, state in sorted(self.listed.items()) if state is not None]
        return known[index % len(known)]

    # What must hold

    @invariant()
    def what_is_listed_loads_and_nothing_else_is_listed(self) -> None:
        if not hasattr(self, "vault"):
            return
        found = {
            (m.kind, m.run_id, m.name): (m.step, load(self.vault, m))
            for m in self.vault.manifests()
        }
        assert found == {key: state for key, state in self.listed.items() if state is not None}

    @invariant()
    def nothing_half_written_lies_around(self) -> None:
        if hasattr(self, "vault"):
            assert self.files("tmp") == []


class BucketMachine(VaultMachine):
    """The same with a vault in a bucket, whose store goes away where a disk would fall."""

    bucket: Bucket

    def new_disk(self) -> Any:
        return Remote(self.bucket, self.base)

    def open(self) -> Vault:
        return Vault(self.base, storage=self.bucket.storage(retry_seconds=0.05))

    def files(self, prefix: str) -> list[str]:
        return [path.rpartition("/")[0] for path in self.bucket.objects(prefix)]

    def flipped(self, key: str, place: float, bit: int) -> Any:
        path = self.bucket.only(key)
        return flipped(
            lambda: self.bucket.objects(key)[path],
            lambda content: self.bucket.put(path, content),
            place,
            bit,
        )


class Remote:
    """What a disk is, for a bucket: it fails by not answering, and is as durable as it is there."""

    def __init__(self, bucket: Bucket, base: Path) -> None:
        self._bucket = bucket
        (base / "tmp").mkdir()
        bucket.renew()

    def __enter__(self) -> None:
        self.stand()

    def __exit__(self, *_: object) -> None:
        self.stand()

    def fall(self, after: int, death: Death) -> None:
        fault = "lost reply" if death == "power cut" else "reset"
        self._bucket.fault(fault, first=after + 1, count=1 << 30)

    def stand(self) -> None:
        self._bucket.fault()

    def restart(self, death: Death) -> None:
        self.stand()


class flipped:
    """A file with one bit flipped, for a while."""

    def __init__(
        self,
        read: Callable[[], bytes],
        write: Callable[[bytes], object],
        place: float,
        bit: int,
    ) -> None:
        self.write = write
        self.content = read()
        damaged = bytearray(self.content)
        damaged[int(place * len(damaged))] ^= 1 << bit
        self.damaged = bytes(damaged)

    def __enter__(self) -> None:
        self.write(self.damaged)

    def __exit__(self, *_: object) -> None:
        self.write(self.content)


TestVault = VaultMachine.TestCase
TestVault.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.slow
def test_the_same_in_a_bucket(bucket: Bucket) -> None:
    class Machine(BucketMachine):
        pass

    Machine.bucket = bucket
    few = settings(TestVault.settings, max_examples=8, stateful_step_count=12)
    run_state_machine_as_test(Machine, settings=few)
