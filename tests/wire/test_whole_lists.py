"""Lists of tokens and values that are read at once: as when each value is read by itself."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from everstep.wire import types, whole_lists

FEW = random.Random(7)
MANY = [FEW.randrange(2, 150_000) for _ in range(2048)]


class Token(IntEnum):
    """A token by name."""

    END = 7


TOKENS: list[list[Any]] = [
    [],
    [5],
    [0],
    [1],
    [0, 1, 2, 3],
    MANY,
    [*MANY, 1],
    [*MANY, -1],
    [*MANY, True],
    [True],
    [2, False],
    [-1],
    [-(2**31)],
    [-(2**31) - 1],
    [2**31 - 1],
    [2**31],
    [2**63],
    [10**400],
    [5, 6.0],
    [5, 2.5],
    [5, math.nan],
    [5, math.inf],
    ["5"],
    [5, "six"],
    [5, b"6"],
    [5, None],
    [5, [6]],
    [5, {}],
    [np.int64(5)],
    [5, np.int32(6)],
    [5, np.float32(6.5)],
    [5, torch.tensor(6)],
    [Decimal(5)],
    [5, Fraction(1, 2)],
    [5, 6j],
    [5, object()],
]


def outcome(build: Callable[[], Any]) -> Any:
    """What comes of it: a value, or the kind and the text of the error."""
    try:
        return build()
    except ValidationError as error:
        return [(each["type"], each["loc"], each["msg"]) for each in error.errors()]
    except (TypeError, ValueError, OverflowError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("tokens", TOKENS, ids=range(len(TOKENS)))
def test_list_of_tokens_is_read_as_each_token(
    tokens: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> Any:
        chunk = types.EncodedTextChunk(tokens=tokens)
        return [type(each) for each in chunk.tokens], chunk.model_dump_json()

    def read_input() -> Any:
        return types.ModelInput.from_ints(tokens).model_dump_json()

    found = outcome(read), outcome(read_input)
    monkeypatch.setattr(whole_lists, "token_ids", lambda values: None)
    assert found == (outcome(read), outcome(read_input))


def test_usual_list_of_tokens_is_read_at_once() -> None:
    assert whole_lists.token_ids(MANY) == MANY
    assert whole_lists.token_ids([0, 1, 2]) == [0, 1, 2]


def test_tokens_are_copied() -> None:
    given = [5, 6]
    chunk, whole = types.EncodedTextChunk(tokens=given), types.ModelInput.from_ints(given)
    given[0] = 9
    assert list(chunk.tokens) == whole.to_ints() == [5, 6]


def test_named_tokens_are_numbers_in_json() -> None:
    assert '"tokens":[7]' in types.ModelInput.from_ints([Token.END]).model_dump_json()


def of_bits() -> list[float]:
    """Floats of any bits: subnormals, NaN with payloads, and those that float32 can't hold."""
    bits = struct.pack("<512Q", *(FEW.getrandbits(64) for _ in range(512)))
    return [
        each for each in np.frombuffer(bits, "<f8").tolist() if abs(each) < 1e38 or each != each
    ]


VALUES: list[list[Any]] = [
    [],
    MANY,
    [each / 7 for each in MANY],
    [0, 1, 1, 0],
    [1, 2.5],
    [2.5, 1],
    [True, False],
    [1, True],
    [0.5, True],
    [0.1, -0.0, 1e-46, 5e-324, math.inf, -math.inf, math.nan, -math.nan],
    [0.5, 1e39],
    [0.5, 10**400],
    [2**53 + 1, 2**24 + 1, 2**62 + 2**38 + 1],
    [0.5, 2**53 + 1, 2**62 + 2**38 + 1],
    [2**63 - 1, -(2**63)],
    [2**63],
    [2**64],
    [1, None],
    [0.5, None],
    [None],
    ["1"],
    [0.5, "1"],
    [1, "1"],
    [[1, 2], [3, 4]],
    [[0.5], [1.5]],
    [[1], [2, 3]],
    [1, [2]],
    [0.5, Decimal("1.5")],
    [1, Fraction(1, 2)],
    [0.5, np.float32(0.1)],
    [np.float64(0.5)],
    [1, np.int64(2)],
    [0.5, torch.tensor(1.5)],
    [1, 2j],
    [0.5, object()],
    of_bits(),
]


@pytest.mark.parametrize("key", ["target_tokens", "weights"])
@pytest.mark.parametrize("values", VALUES, ids=range(len(VALUES)))
def test_list_of_values_is_read_as_numpy_reads_it(
    values: list[Any], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> Any:
        data = types.Datum(model_input=types.ModelInput.empty(), loss_fn_inputs={key: values})
        array = data.loss_fn_inputs[key].to_numpy()
        assert array.flags.writeable and array.flags.owndata
        return array.tobytes(), array.dtype, array.shape, data.loss_fn_inputs[key].shape

    with np.errstate(all="ignore"):
        found = outcome(read)
        monkeypatch.setattr(whole_lists, "array_of", lambda values, dtype: None)
        assert found == outcome(read)


def test_usual_lists_of_values_are_read_at_once() -> None:
    for values, dtype in ((MANY, "int64"), (MANY, "float32"), ([0.5, 1.5], "float32")):
        packed = whole_lists.array_of(values, dtype)
        assert packed is not None and packed.dtype == dtype
