"""Imports torch and transformers without what only compiled and distributed models need.

Both import torch's compiler, for decorators that tell it how to treat a function, and with it
distributed tensors: some 400 modules. A worker compiles nothing and distributes no model.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_TRACING = "torch._dynamo._trace_wrapped_higher_order_op"


def import_libraries() -> None:
    """Import torch, and of transformers what every worker and the loading of a model need."""
    import torch

    if _COMPILER not in sys.modules:
        Compiler(torch).install()
    with _not_distributed(torch):
        import torch.fx.experimental.symbolic_shapes  # which meta tensors use as a model is loaded
        import transformers.generation.utils
        import transformers.modeling_layers
        import transformers.modeling_utils
        import transformers.models.auto.modeling_auto
        import transformers.models.llama.modeling_llama
        import transformers.processing_utils  # noqa: F401


@contextmanager
def no_collections() -> Iterator[None]:
    """Disable garbage collection, and exempt from it all objects that exist at the end.

    Imports leave little garbage, and searching all modules for it takes a fifth of their time.
    Later collections in a forked worker don't touch, and so don't copy, the pages it shares.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Compiler(ModuleType):
    """Stands in for torch's compiler until something else than its decorators is used.

    Its decorators return functions unchanged. It is replaced by the compiler itself when any other
    attribute of it is read or a module of it is imported.

    Args:
        torch: the package.
    """

    def __init__(self, torch: ModuleType) -> None:
        super().__init__(_COMPILER)
        self.__path__: list[str] = []
        self._torch: Any = torch
        self._finder = _Finder(self)
        self.disable = self.allow_in_graph = self.assume_constant_result = _undecorated

    def install(self) -> None:
        """Have imports of the compiler find this module."""
        tracing: Any = ModuleType(_TRACING)
        tracing.TransformGetItemToIndex = _transform_getitem_to_index
        sys.modules.update({_COMPILER: self, _TRACING: tracing})
        self._torch._dynamo = self
        sys.meta_path.insert(0, self._finder)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # as `inspect` reads of every module
            raise AttributeError(name)
        return getattr(self.replaced(), name)

    def replaced(self) -> ModuleType:
        """Return the compiler, in whose place this module was until now."""
        if sys.modules.get(_COMPILER) is self:
            sys.meta_path.remove(self._finder)
            del sys.modules[_COMPILER], sys.modules[_TRACING], self._torch._dynamo
        return importlib.import_module(_COMPILER)


class _Finder:
    """Finds a module of the compiler, which is imported first, as always before its modules."""

    def __init__(self, stand_in: Compiler) -> None:
        self._stand_in = stand_in

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if not name.startswith(_COMPILER + "."):
            return None
        compiler = self._stand_in.replaced()
        if name in sys.modules:
            return ModuleSpec(name, _Imported(sys.modules[name]))
        return PathFinder.find_spec(name, compiler.__path__)


class _Imported(Loader):
    """Loads a module that was imported while it was searched for."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _undecorated(function: Any = None, *_arguments: object, **_options: object) -> Any:
    return _undecorated if function is None else function


def _transform_getitem_to_index() -> Any:
    """Stand in for the class `TransformGetItemToIndex`, which transformers makes masks with."""
    compiler: Any = sys.modules[_COMPILER]
    return compiler._trace_wrapped_higher_order_op.TransformGetItemToIndex()


@contextmanager
def _not_distributed(torch: Any) -> Iterator[None]:
    """Have transformers find torch without its distributed package, as on some systems."""
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = is_available
