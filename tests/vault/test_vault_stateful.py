"""Stateful test: the vault and a model of it, with errors, kills and power cuts at any call."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck
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
    CheckpointId,
    CheckpointNotFound,
    FileRef,
    Vault,
    gc,
)
from everstep.vault.export import export
from everstep.vault.storage.keys import blob_key, digest_of, manifest_key
from tests.buckets.bucket import Bucket
from tests.profiles import example_count
from tests.vault.checkpoints import draft, halves, load, save
from tests.vault.disk import Dead, Death, Disk

Key = tuple[str, str, str]
State = tuple[int, dict[str, bytes]] | None  # step, files

keys = st.tuples(
    st.sampled_from(["training", "sampler"]), st.sampled_from(["r:0", "r:1"]), st.just("x")
)
bytes_of_files = st.sampled_from([b"", b"a", b"shared", b"\0" * 3000, b"other"])
contents = st.dictionaries(st.sampled_from(["adapter", "optimizer"]), bytes_of_files, min_size=1)
faults = st.none() | st.tuples(st.integers(0, 30), st.sampled_from(["kill", "power cut", "error"]))
indices = st.integers(0, 30)


class VaultMachine(RuleBasedStateMachine):
    """Applies the same rules to a vault and to a model.

    The model holds the listed checkpoints. After a change that died without acknowledgement the
    machine reads the checkpoint, which must be in one of its possible states. Until that state is
    known to be durable, a power cut may turn it into another of them.
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
        """Open the vault as a new process does."""
        return Vault(self.disk.home / "vault")

    def files(self, prefix: str) -> list[str]:
        """Return the keys of the files on the storage, without the vault's help."""
        root = self.disk.home / "vault"
        found = (root / prefix).rglob("*")
        return [path.relative_to(root).as_posix() for path in found if path.is_file()]

    def flipped(self, key: str, position: float, bit: int) -> Any:
        """Return a context in which one bit of a file is flipped."""
        path = self.disk.home / "vault" / key
        return flipped(path.read_bytes, path.write_bytes, position, bit)

    def teardown(self) -> None:
        self.disk.__exit__()
        shutil.rmtree(self.base)

    def attempt(self, work: Callable[[], object], fault: tuple[int, Death] | None) -> bool:
        """Return whether work was acknowledged. After a death, continue with a new process."""
        if fault is None:
            work()
            return True
        self.disk.fail_after(*fault)
        try:
            work()
        except Dead:
            self.disk.restart(fault[1])
            self.vault = self.open()
            return False
        except OSError:
            return False
        finally:
            self.disk.clear_fault()
        return True

    def change(
        self, key: Key, new: State, work: Callable[[], object], fault: tuple[int, Death] | None
    ) -> None:
        possible = [*self.unsure.get(key, []), self.listed.get(key), new]
        if self.attempt(work, fault):
            possible = [new]
        self.unsure[key] = possible
        if fault is not None and fault[1] == "power cut":
            self.resolve()
        else:
            self.resolve(key)

    def resolve(self, *wanted: Key) -> None:
        """Read the state of unacknowledged changes, of some keys or of all."""
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

    @rule(key=keys, files=contents, overwrite=st.booleans(), fault=faults)
    def save(
        self, key: Key, files: dict[str, bytes], overwrite: bool, fault: tuple[int, Death] | None
    ) -> None:
        kind, run, name = key
        self.step += 1

        def work() -> None:
            save(self.vault, name, files, kind=kind, run=run, step=self.step, overwrite=overwrite)

        if self.listed.get(key) is not None and not overwrite:
            with pytest.raises(CheckpointExists, match=name):
                work()
        else:
            self.change(key, (self.step, files), work, fault)

    @rule(key=keys, files=contents)
    def save_while_collecting(self, key: Key, files: dict[str, bytes]) -> None:
        kind, run, name = key
        self.step += 1
        with self.vault.gc_paused():
            refs = {}
            for file, content in files.items():
                refs[file] = self.vault.put(halves(content))
                assert gc.collect(self.vault, 0) == []
            manifest = draft(name, refs, kind=kind, run=run, step=self.step)
            self.vault.commit(manifest, overwrite=True)
            assert gc.collect(self.vault, 0) == []
        self.unsure[key] = [(self.step, files)]
        self.resolve(key)

    @precondition(lambda self: any(self.listed.values()))
    @rule(index=indices, key=keys)
    def fork(self, index: int, key: Key) -> None:
        known = [key for key, state in sorted(self.listed.items()) if state is not None]
        source = self.vault.manifest(*known[index % len(known)])
        self.step += 1
        kind, run, name = key
        state = (self.step, load(self.vault, source))
        copy = draft(name, source.files, kind=kind, run=run, step=self.step)
        self.change(key, state, lambda: self.vault.commit(copy, overwrite=True), None)

    @rule(key=keys)
    def commit_missing_file(self, key: Key) -> None:
        kind, run, name = key
        nothing = draft(name, {"lost": FileRef(blake3="0" * 64, size=1)}, kind=kind, run=run)
        with pytest.raises(CheckpointDamaged, match="lost"):
            self.vault.commit(nothing, overwrite=True)

    @rule(content=bytes_of_files, fault=faults)
    def put_without_commit(self, content: bytes, fault: tuple[int, Death] | None) -> None:
        if not self.attempt(lambda: self.vault.put([content]), fault) and fault is not None:
            self.after_death(fault[1])

    def after_death(self, death: Death) -> None:
        if death == "power cut":
            self.resolve() if self.unsure else None

    # Deletion, collection

    @rule(key=keys, fault=faults)
    def delete(self, key: Key, fault: tuple[int, Death] | None) -> None:
        there = self.listed.get(key) is not None
        answers: list[bool] = []
        if not there and self.unsure.get(key):
            return  # the deletion of an absent checkpoint makes nothing durable
        self.change(key, None, lambda: answers.append(self.vault.delete(*key)), fault)
        assert answers in ([], [there])

    @rule(fault=faults)
    def collect(self, fault: tuple[int, Death] | None) -> None:
        if self.attempt(lambda: gc.collect(self.vault, 0), fault):
            self.unsure.clear()  # a collection makes durable what it saw
            assert self.blobs() == self.reachable()
        elif fault is not None:
            self.after_death(fault[1])

    def blobs(self) -> set[str]:
        return {digest_of(key) for key in self.files("blobs")}

    def reachable(self) -> set[str]:
        return {ref.blake3 for m in self.vault.manifests() for ref in m.files.values()}

    # Other processes, exports, damage

    @rule()
    def reopen(self) -> None:
        self.vault = self.open()

    @rule()
    def power_cut(self) -> None:
        self.disk.restart("power cut")
        self.vault = self.open()
        self.after_death("power cut")

    @precondition(lambda self: any(self.listed.values()))
    @rule(index=indices)
    def export(self, index: int) -> None:
        key, state = self.pick(index)
        directory = self.base / "export"
        paths = export(self.vault, self.vault.manifest(*key), directory)
        assert state is not None
        assert {path.name: path.read_bytes() for path in paths} == state[1]
        assert len(list(directory.iterdir())) == len(paths)
        shutil.rmtree(directory)

    @precondition(lambda self: any(self.listed.values()))
    @rule(index=indices, position=st.floats(0, 0.999), bit=st.integers(0, 7))
    def corrupt_a_manifest(self, index: int, position: float, bit: int) -> None:
        (kind, run, name), _ = self.pick(index)
        label = re.escape(CheckpointId(kind, run, name).label)
        with self.flipped(manifest_key(kind, run, name), position, bit):
            for access in (
                lambda: self.vault.manifest(kind, run, name),
                lambda: list(self.vault.manifests()),
                lambda: gc.collect(self.vault, 0),
            ):
                with pytest.raises(CheckpointDamaged, match=label):
                    access()

    @precondition(lambda self: any(self.listed.values()))
    @rule(index=indices, position=st.floats(0, 0.999), bit=st.integers(0, 7))
    def corrupt_a_file(self, index: int, position: float, bit: int) -> None:
        key, state = self.pick(index)
        manifest = self.vault.manifest(*key)
        assert state is not None
        file = sorted(manifest.files)[index % len(manifest.files)]
        ref = manifest.files[file]
        if not ref.size:
            return
        with self.flipped(blob_key(ref.blake3), position, bit):
            with pytest.raises(CheckpointDamaged, match=file):
                self.vault.read(manifest, file)
            with pytest.raises(CheckpointDamaged):
                export(self.vault, manifest, self.base / "never")
            assert not (self.base / "never").exists()

    def pick(self, index: int) -> tuple[Key, State]:
        known = [(key, state) for key, state in sorted(self.listed.items()) if state is not None]
        return known[index % len(known)]

    # Invariants

    @invariant()
    def listed_checkpoints_equal_the_model(self) -> None:
        if not hasattr(self, "vault"):
            return
        found = {
            (m.kind, m.run_id, m.name): (m.step, load(self.vault, m))
            for m in self.vault.manifests()
        }
        assert found == {key: state for key, state in self.listed.items() if state is not None}

    @invariant()
    def no_temporary_file_is_left(self) -> None:
        if hasattr(self, "vault"):
            assert self.files("tmp") == []


class BucketMachine(VaultMachine):
    """The same rules for a vault in a bucket, whose store stops answering instead of dying."""

    bucket: Bucket

    def new_disk(self) -> Any:
        return Remote(self.bucket, self.base)

    def open(self) -> Vault:
        return Vault(self.base, storage=self.bucket.storage(retry_seconds=0.05))

    def files(self, prefix: str) -> list[str]:
        return [path.rpartition("/")[0] for path in self.bucket.objects(prefix)]

    def flipped(self, key: str, position: float, bit: int) -> Any:
        path = self.bucket.only(key)
        return flipped(
            lambda: self.bucket.objects(key)[path],
            lambda content: self.bucket.put(path, content),
            position,
            bit,
        )


class Remote:
    """A `Disk` for a bucket: it fails by not answering, and all that it holds is durable."""

    def __init__(self, bucket: Bucket, base: Path) -> None:
        self._bucket = bucket
        (base / "tmp").mkdir()
        bucket.clear()

    def __enter__(self) -> None:
        self.clear_fault()

    def __exit__(self, *_: object) -> None:
        self.clear_fault()

    def fail_after(self, calls: int, death: Death) -> None:
        kind = "lost reply" if death == "power cut" else "reset"
        self._bucket.fault(kind, first=calls + 1, count=1 << 30)

    def clear_fault(self) -> None:
        self._bucket.fault()

    def restart(self, death: Death) -> None:
        self.clear_fault()


class flipped:
    """A context in which one bit of a file is flipped."""

    def __init__(
        self,
        read: Callable[[], bytes],
        write: Callable[[bytes], object],
        position: float,
        bit: int,
    ) -> None:
        self.write = write
        self.content = read()
        damaged = bytearray(self.content)
        damaged[int(position * len(damaged))] ^= 1 << bit
        self.damaged = bytes(damaged)

    def __enter__(self) -> None:
        self.write(self.damaged)

    def __exit__(self, *_: object) -> None:
        self.write(self.content)


TestVault = VaultMachine.TestCase
TestVault.settings = example_count(
    100,
    stateful_step_count=25,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.slow
def test_vault_in_a_bucket_equals_the_model(bucket: Bucket) -> None:
    class Machine(BucketMachine):
        pass

    Machine.bucket = bucket
    few = example_count(8, parent=TestVault.settings, stateful_step_count=12)
    run_state_machine_as_test(Machine, settings=few)
