"""Custom losses: parsed without evaluating code, evaluated within bounds, equal to torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from everstep.client._operations.loss_handle import encode, trace
from everstep.engine import Model, forward_backward
from everstep.engine.errors import InputError
from everstep.engine.losses import graph_run
from everstep.engine.losses.graph_operations import ATTRIBUTES, FUNCTIONS, METHODS
from everstep.engine.losses.graph_read import MAX_CONSTANTS, MAX_NODES, LossProgram, parse_loss
from everstep.engine.losses.graph_run import MAX_BYTES, CustomLoss
from everstep.engine.validation import check_pass
from everstep.runtime.payloads import payload_json
from everstep.wire.messages.passes import Example
from tests.engine.helpers import buffers, examples, finish, trained
from tests.profiles import example_count

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch, of odd arguments

Loss = Callable[..., Any]


def uploaded(fn: Loss, **ranks: int) -> dict[str, Any]:
    """Return a loss as a client sends it."""
    handle = trace(fn, {"logprobs": 1, **ranks}, "session")
    return {
        "name": handle.name,
        "inputs": [item.model_dump() for item in handle.inputs],
        "graph": encode(handle).model_dump(),
    }


def clipped(logprobs: Any, advantages: Any, old: Any) -> Any:
    ratio = torch.exp(logprobs - old)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
    return loss, {"custom/ratio:mean": ratio.mean(), "custom/tokens:sum": (advantages != 0).sum()}


def masked_gspo(logprobs: Any, advantages: Any, old: Any) -> Any:
    chosen = advantages > 0
    log_ratio = (logprobs.detach() - old)[chosen].mean()
    ratio = torch.exp(log_ratio + logprobs - logprobs.detach())
    n = logprobs.shape[0]
    total = -(ratio * advantages).sum()
    total = total / n + math.sqrt(n)
    return total, {}


def functional(logprobs: Any, advantages: Any, old: Any) -> Any:
    loss = F.huber_loss(logprobs, old, delta=0.3, reduction="sum") + F.softplus(-logprobs).sum()
    loss += F.logsigmoid(logprobs * advantages).mean()
    weights = F.softmax(advantages, dim=-1) + F.pad(old[1:], (0, 1)).sigmoid()
    loss = loss + (weights * logprobs).sum() - F.mse_loss(logprobs, old)
    return loss, {"custom/w:mean": weights.max()}


def shapes(logprobs: Any, advantages: Any, old: Any) -> Any:
    pairs = logprobs[:, None] - logprobs[None, :]
    signs = torch.sign(advantages[:, None] - advantages[None, :])
    zeros = torch.zeros(pairs.shape, device=logprobs.device, dtype=logprobs.dtype)
    loss = torch.where(signs > 0, -F.logsigmoid(pairs), zeros).sum()
    stacked = torch.stack([logprobs, old.to(torch.float32)], dim=0).amax(dim=0)
    steps = torch.arange(logprobs.size(0), dtype=torch.float32)
    loss = loss + (stacked * 0.9**steps).cumsum(0)[-1] + torch.cat((logprobs[1:], old[:1])).std()
    best, _ = torch.max(logprobs.view(1, -1), dim=-1)
    return loss - best.squeeze(), {"custom/best:mean": best.sum()}


LOSSES = [clipped, masked_gspo, functional, shapes]


def values(seed: int, length: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=random) - (2 if index == 0 else 0) for index in range(3)]


@example_count(40)
@given(fn=st.sampled_from(LOSSES), seed=st.integers(0, 1000), length=st.integers(2, 20))
def test_a_custom_loss_equals_its_python_function(fn: Loss, seed: int, length: int) -> None:
    logprobs, advantages, old = values(seed, length)
    advantages[0] = 1.0
    program = parse_loss(uploaded(fn, advantages=1, old=1))
    inputs = {"advantages": advantages, "old": old, "logprobs": torch.zeros(1), "weights": old}
    found = CustomLoss(program).evaluate(logprobs, inputs)
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = fn(leaf, advantages, old)
    (slope,) = torch.autograd.grad(loss, leaf)
    assert found.loss == float(loss.detach())
    assert torch.equal(found.gradient, slope)
    assert found.metrics == {key: float(value.detach()) for key, value in metrics.items()}


def test_inputs_may_have_rank_two_or_be_scalars() -> None:
    def loss(logprobs: Any, temperature: Any, weights: Any) -> Any:
        return -(logprobs * weights / temperature).sum(), {}

    program = parse_loss(uploaded(loss, logprobs=2, temperature=0, weights=2))
    logprobs = -torch.rand(4, 3)
    inputs = {"temperature": torch.tensor([2.0]), "weights": torch.rand(4, 3)}
    assert torch.equal(
        CustomLoss(program).evaluate(logprobs, inputs).gradient, -inputs["weights"] / 2
    )
    with pytest.raises(InputError, match="'weights' has rank 1"):
        CustomLoss(program).evaluate(logprobs, {**inputs, "weights": torch.rand(4)})


# Rejected graphs


def node(op: str, name: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


LOGPROBS = node("placeholder", "logprobs", "logprobs")


def graph(*nodes: dict[str, Any], loss: Any = None, metrics: Any = None) -> dict[str, Any]:
    last = nodes[-1]["name"] if nodes else "logprobs"
    result = {"tuple": [loss or {"ref": last}, metrics or {"dict": {}}]}
    return {
        "name": "hostile",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {"format": 1, "nodes": [LOGPROBS, *nodes, node("output", "o", "output", result)]},
    }


REF = {"ref": "logprobs"}
DEEP: Any = 1
for _ in range(50):
    DEEP = [DEEP]
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a module's function": (graph(node("call_function", "x", "os.system", REF)), "os.system"),
    "eval": (graph(node("call_function", "x", "builtins.eval", REF)), "builtins.eval"),
    "a file": (graph(node("call_function", "x", "torch.load", REF)), "torch.load"),
    "a file written": (graph(node("call_function", "x", "torch.save", REF)), "torch.save"),
    "a way round": (graph(node("call_function", "x", "torch.os.system", REF)), "torch.os.system"),
    "an inner function": (graph(node("call_function", "x", "torch._C._nn.x", REF)), "torch._C"),
    "random numbers": (graph(node("call_function", "x", "torch.rand_like", REF)), "rand_like"),
    "raw memory": (graph(node("call_method", "x", "as_strided", REF, [9], [1])), "as_strided"),
    "in place": (graph(node("call_method", "x", "add_", REF, 1)), "add_"),
    "Python values": (graph(node("call_method", "x", "tolist", REF)), "tolist"),
    "a dunder method": (graph(node("call_method", "x", "__reduce__", REF)), "__reduce__"),
    "a hook": (graph(node("call_method", "x", "register_hook", REF)), "register_hook"),
    "an attribute": (graph(node("call_function", "x", "getattr", REF, "__class__")), "__class__"),
    "an attribute made": (graph(node("call_function", "x", "getattr", REF, REF)), "'name'"),
    "data": (graph(node("call_function", "x", "getattr", REF, "data")), "'data'"),
    "a tensor from outside": (graph(node("get_attr", "x", "weight")), "get_attr"),
    "a module": (graph(node("call_module", "x", "layer", REF)), "call_module"),
    "out=": (graph(node("call_function", "x", "torch.exp", REF, out=REF)), "'out'"),
    "in place by name": (
        graph(node("call_function", "x", "torch.nn.functional.silu", REF, inplace=True)),
        "'inplace'",
    ),
    "in place by position": (
        graph(node("call_function", "x", "torch.nn.functional.silu", REF, True)),
        "'inplace'",
    ),
    "in place of an input": (
        graph(node("call_function", "x", "operator.iadd", REF, 1)),
        "in place to 'logprobs'",
    ),
    "too many arguments": (graph(node("call_function", "x", "torch.exp", REF, 1)), "1 arguments"),
    "no argument": (graph(node("call_function", "x", "torch.exp")), "misses"),
    "a constant for a tensor": (graph(node("call_function", "x", "torch.exp", 1.0)), "1.0"),
    "text": (graph(node("call_function", "x", "operator.mul", "ab", 10**9)), "'ab'"),
    "an object": (graph(node("call_function", "x", "operator.mul", {"py": "x"}, 1)), "py"),
    "two tags": (graph(node("call_function", "x", "torch.exp", {**REF, "slice": 1})), "can't hold"),
    "a GPU": (
        graph(node("call_function", "x", "torch.zeros", 3, device={"device": "cuda"})),
        "cuda",
    ),
    "a later node": (graph(node("call_function", "x", "torch.exp", {"ref": "y"})), "no earlier"),
    "itself": (graph(node("call_function", "x", "torch.exp", {"ref": "x"})), "no earlier"),
    "a name twice": (graph(node("call_function", "logprobs", "torch.exp", REF)), "two of this"),
    "a dunder name": (graph(node("call_function", "__x__", "torch.exp", REF)), "__x__"),
    "code as a name": (graph(node("call_function", "x; import os", "torch.exp", REF)), "import os"),
    "a huge number": (graph(node("call_function", "x", "operator.mul", REF, 2**80)), "can't hold"),
    "deep arguments": (graph(node("call_function", "x", "operator.getitem", REF, DEEP)), "deeper"),
    "many arguments": (
        graph(node("call_function", "x", "torch.tensor", list(range(MAX_CONSTANTS + 1)))),
        "more than",
    ),
    "many nodes": (
        graph(*[node("call_function", f"x{i}", "torch.exp", REF) for i in range(MAX_NODES)]),
        "nodes",
    ),
    "a metric of another kind": (
        graph(node("call_method", "x", "sum", REF), metrics={"dict": {"loss:sum": {"ref": "x"}}}),
        "loss:sum",
    ),
    "a constant metric": (
        graph(node("call_method", "x", "sum", REF), metrics={"dict": {"custom/a:sum": 1}}),
        "custom/a:sum",
    ),
    "a constant loss": (graph(node("call_method", "x", "sum", REF), loss=1.0), "has to be"),
    "no metrics": (graph(node("call_method", "x", "sum", REF), metrics=[1]), "has to be"),
    "another input": (graph(node("placeholder", "x", "x")), "declares"),
    "a default": (graph(node("placeholder", "x", "x", 1)), "no default"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_rejected_by_name(name: str) -> None:
    loss, words = HOSTILE[name]
    with pytest.raises(InputError) as caught:
        parse_loss(loss)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


COSTLY: dict[str, tuple[list[dict[str, Any]], str]] = {
    "memory": ([node("call_function", "x", "torch.zeros", [100_000, 100_000])], "bytes"),
    "memory without data": ([node("call_method", "x", "expand", REF, 2**40, 5)], "bytes"),
    "sizes beyond all": ([node("call_function", "x", "torch.ones", [2**40, 2**40])], "'x'"),
    "a long range": ([node("call_function", "x", "torch.arange", 10**15)], "bytes"),
    "growth by steps": (
        [
            node("call_function", "x0", "torch.cat", [REF, REF]),
            *[
                node("call_function", f"x{i + 1}", "torch.cat", [{"ref": f"x{i}"}] * 2)
                for i in range(40)
            ],
        ],
        "bytes",
    ),
    "products": (
        [
            node("call_function", "x", "torch.ones", [2000, 2000]),
            node("call_function", "y", "torch.matmul", input={"ref": "x"}, other={"ref": "x"}),
        ],
        "multiplications",
    ),
    "Python's powers": (
        [
            node("call_method", "n", "size", REF, 0),
            node("call_function", "x", "operator.pow", {"ref": "n"}, 10**9),
        ],
        "powers",
    ),
    "Python's numbers": (
        [
            node("call_method", "n", "size", REF, 0),
            node("call_function", "x", "operator.pow", {"ref": "n"}, 60),
        ],
        "too large",
    ),
    "Python's lists": (
        [
            node("call_function", "n", "getattr", REF, "shape"),
            node("call_function", "x", "operator.mul", {"ref": "n"}, 10**12),
        ],
        "numbers or tensors",
    ),
    "a method for a value": (
        [
            node("call_function", "n", "getattr", REF, "values"),
            node("call_function", "x", "operator.add", {"ref": "n"}, 1),
        ],
        "isn't an attribute",
    ),
    # Ends a process that lets it through: the smallest integer has no negative.
    "division by minus one": (
        [
            node("call_method", "x", "long", REF),
            node("call_function", "y", "torch.full_like", {"ref": "x"}, -(2**63)),
            node("call_method", "z", "div", {"ref": "y"}, -1, rounding_mode="trunc"),
        ],
        "of integers",
    ),
    "floor division": (
        [
            node("call_method", "x", "long", REF),
            node("call_function", "y", "operator.floordiv", {"ref": "x"}, -1),
        ],
        "of integers",
    ),
    "an index far away": ([node("call_function", "x", "operator.getitem", REF, 99)], "'x'"),
    "shapes that don't fit": (
        [
            node("call_function", "y", "torch.ones", 3),
            node("call_function", "x", "operator.add", REF, {"ref": "y"}),
        ],
        "(add)",
    ),
    "no scalar": ([node("call_function", "x", "torch.exp", REF)], "scalar"),
    "nothing of logprobs": (
        [
            node("call_function", "y", "torch.ones", 3),
            node("call_method", "x", "sum", {"ref": "y"}),
        ],
        "depends on logprobs",
    ),
    "a loss of integers": (
        [node("call_method", "y", "long", REF), node("call_method", "x", "sum", {"ref": "y"})],
        "depends on logprobs",
    ),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_or_ill_shaped_graph_is_rejected_before_it_runs(name: str) -> None:
    nodes, words = COSTLY[name]
    program = parse_loss(graph(*nodes))
    with pytest.raises(InputError) as caught:
        CustomLoss(program).evaluate(-torch.rand(5), {})
    assert words in str(caught.value)
    assert "hostile" in str(caught.value)


def test_many_small_tensors_count_towards_the_memory_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A value costs memory besides its data: here 50 kB of numbers lie in 10,000 tensors."""
    monkeypatch.setattr(graph_run, "MAX_BYTES", 4 << 20)
    repeated = node("call_method", "r", "repeat", REF, 500)
    parts = [node("call_method", f"x{i}", "unbind", {"ref": "r"}) for i in range(4)]
    with pytest.raises(InputError, match=r"holds \d+ bytes of at most"):
        CustomLoss(parse_loss(graph(repeated, *parts))).evaluate(-torch.rand(5), {})


def test_bounds_leave_room_for_a_large_loss() -> None:
    """A pairwise loss over a thousand tokens takes a few megabytes."""
    program = parse_loss(uploaded(shapes, advantages=1, old=1))
    logprobs, advantages, old = values(1, 1000)
    CustomLoss(program).evaluate(logprobs, {"advantages": advantages, "old": old})
    assert MAX_BYTES >= 16 * 1000 * 1000


def test_the_guide_lists_the_allowed_operations() -> None:
    path = Path(__file__).parents[2] / "docs/guides/losses.md"
    guide = path.read_text().split("### What a graph may hold")[1]
    listed = set(re.findall(r"`(\w+)`", guide.split("\n| | |")[1].split("\n\n")[0]))
    assert listed
    called = {op.name for op in (*FUNCTIONS.values(), *METHODS.values())}
    python = {op.name for op in FUNCTIONS.values() if op.surface == "operator"}
    assert listed - ATTRIBUTES == called - (python - {op.name for op in METHODS.values()})
    assert listed >= ATTRIBUTES


# Any graph is either rejected with a message or runs.

names = st.sampled_from(["logprobs", "a", "b", "c", "__class__", "x y", ""])
targets = st.sampled_from(
    [*FUNCTIONS, *METHODS, "getattr", "os.system", "torch.load", "__init__", "torch.Tensor.exp", ""]
)
constants = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, -(2**63), 2**63, 10**30]),
    st.floats(allow_nan=True),
    st.sampled_from(["shape", "dtype", "sum", "__class__", "trunc"]),
    names.map(lambda name: {"ref": name}),
    st.sampled_from(["inf", "-inf", "nan", "no"]).map(lambda text: {"float": text}),
    st.sampled_from(["float32", "int64", "complex64", "object"]).map(lambda text: {"dtype": text}),
    st.just({"ellipsis": True}),
    st.just({"device": "cpu"}),
)
arguments = st.recursive(
    constants,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(lambda items: {"tuple": items}),
        st.lists(inner, min_size=3, max_size=3).map(lambda items: {"slice": items}),
        st.dictionaries(names, inner, max_size=2).map(lambda items: {"dict": items}),
    ),
    max_leaves=6,
)
keywords = st.dictionaries(
    st.sampled_from(["dim", "keepdim", "min", "out", "dtype", "inplace", "size"]),
    arguments,
    max_size=2,
)
nodes = st.builds(
    lambda op, name, target, args, kwargs: node(op, name, target, *args, **kwargs),
    st.sampled_from(["call_function", "call_method", "get_attr", "placeholder", "output"]),
    names,
    targets,
    st.lists(arguments, max_size=4),
    keywords,
)


@example_count(120)
@given(st.lists(nodes, max_size=5))
def test_any_graph_runs_or_is_rejected(wild: list[dict[str, Any]]) -> None:
    try:
        program = parse_loss(graph(*wild))
        CustomLoss(program).evaluate(-torch.rand(4), {})
    except InputError as refusal:
        assert str(refusal)


@st.composite
def plausible(draw: st.DrawFn) -> dict[str, Any]:
    """Draw graphs of known operations with arguments of the right kinds, so that many run."""
    made = ["logprobs"]
    chain = []
    for index in range(draw(st.integers(1, 6))):
        target = draw(st.sampled_from([*FUNCTIONS, *METHODS]))
        table = FUNCTIONS if target in FUNCTIONS else METHODS
        args = []
        for parameter in table[target].parameters:
            if parameter.optional and draw(st.booleans()):
                break
            ref = {"ref": draw(st.sampled_from(made))}
            small = draw(st.integers(-2, 5))
            args.append(
                {
                    "t": ref,
                    "v": draw(st.sampled_from([ref, small, 0.5, -(2**63)])),
                    "i": draw(st.sampled_from([small, 2**62, -(2**63)])),
                    "n": draw(st.sampled_from([small, 1e300, -0.5])),
                    "b": small > 0,
                    "d": draw(st.sampled_from([small, [small, 0], 2**62])),
                    "s": draw(st.sampled_from([small, [small, 3], 2**62])),
                    "l": [ref, ref],
                    "x": draw(st.sampled_from([ref, small, {"slice": [None, small, None]}])),
                    "k": [small, [small]] if small > 2 else small,
                    "y": {"dtype": draw(st.sampled_from(["float32", "int64", "bool"]))},
                    "a": {"dtype": draw(st.sampled_from(["float64", "int64", "bool"]))},
                    "w": draw(st.sampled_from(["sum", "none", "trunc"])),
                    "1": 1,
                    "0": False,
                }.get(parameter.kind)
            )
        op = "call_function" if table is FUNCTIONS else "call_method"
        chain.append(node(op, f"x{index}", target, *args))
        made.append(f"x{index}")
    return graph(*chain, node("call_method", "last", "sum", {"ref": made[-1]}))


@example_count(200)
@given(plausible())
def test_known_operations_with_any_values_run_or_are_rejected(loss: dict[str, Any]) -> None:
    try:
        CustomLoss(parse_loss(loss)).evaluate(-torch.rand(4), {})
    except InputError as refusal:
        assert str(refusal)


# In a pass


def passed(model: Model, fn: Loss, data: list[Example], *, backward: bool = True) -> Any:
    loss = uploaded(fn, advantages=1, old=1)
    state = trained(model)
    config: dict[str, float | str] = {"loss_id": "l", "program": payload_json(loss).decode()}
    limits: dict[str, Any] = {"vocab_size": 259, "max_context_length": 256}
    check_pass(data, "custom", config, program=parse_loss(loss), **limits)
    steps = forward_backward(model, state, data, "custom", config, backward=backward)
    return finish(steps), state


def datums() -> list[Example]:
    random = np.random.default_rng(4)
    return [
        Example(
            example.tokens,
            {
                "target_tokens": example.inputs["target_tokens"],
                "advantages": random.normal(size=len(example.tokens)).astype(np.float32),
                "old": (random.normal(size=len(example.tokens)) - 5).astype(np.float32),
            },
        )
        for example in examples(3, (9, 17, 5, 40))
    ]


@pytest.mark.parametrize("fn", LOSSES)
def test_a_pass_equals_the_clients_evaluation_bit_for_bit(llama: Model, fn: Loss) -> None:
    data = datums()
    result, state = passed(llama, fn, data)
    plain = [Example(d.tokens, {"target_tokens": d.inputs["target_tokens"]}) for d in data]
    reference = trained(llama)
    forward = finish(forward_backward(llama, reference, plain, "cross_entropy", {}, backward=False))
    total, weighted = 0.0, []
    sums: dict[str, float] = {}
    for datum, output in zip(data, forward.outputs, strict=True):
        leaf = torch.from_numpy(output["logprobs"]).requires_grad_()
        loss, metrics = fn(
            leaf, *(torch.from_numpy(datum.inputs[k]) for k in ("advantages", "old"))
        )
        (slope,) = torch.autograd.grad(loss, leaf)
        total += float(loss.detach())
        for key, value in metrics.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        inputs = {"target_tokens": datum.inputs["target_tokens"], "weights": -slope.numpy()}
        weighted.append(Example(datum.tokens, inputs))
    finish(forward_backward(llama, reference, weighted, "cross_entropy", {}, backward=True))
    assert buffers(state) == buffers(reference)
    assert state.arena.buffers["grads"].norm() > 0
    means = {k: v / len(data) if k.endswith(":mean") else v for k, v in sums.items()}
    assert result.metrics == {"loss:sum": total, **means}
    for one, other in zip(result.outputs, forward.outputs, strict=True):
        assert one["logprobs"].tobytes() == other["logprobs"].tobytes()


def test_a_forward_gives_the_loss_and_no_gradient(llama: Model) -> None:
    with_gradient, _ = passed(llama, clipped, datums())
    without, state = passed(llama, clipped, datums(), backward=False)
    assert without.metrics == with_gradient.metrics
    assert not state.has_gradients


def test_a_failed_loss_leaves_the_run_unchanged(llama: Model) -> None:
    def fragile(logprobs: Any, advantages: Any, old: Any) -> Any:
        return logprobs[6] + (logprobs * advantages * old).sum(), {}

    before = buffers(trained(llama))
    state = trained(llama)
    loss = uploaded(fragile, advantages=1, old=1)
    config: dict[str, float | str] = {"loss_id": "l", "program": payload_json(loss).decode()}
    with pytest.raises(InputError, match=r"'fragile'.*'getitem'"):
        finish(forward_backward(llama, state, datums(), "custom", config, backward=True))
    assert buffers(state) == before
    assert not state.has_gradients


def test_a_gradient_that_is_not_finite_fails_the_pass(llama: Model) -> None:
    def steep(logprobs: Any, advantages: Any, old: Any) -> Any:
        return torch.sqrt(logprobs - logprobs.detach()).sum(), {}

    with pytest.raises(InputError, match="gradients of datum 0 are not finite"):
        passed(llama, steep, datums())


def test_a_missing_input_of_a_custom_loss_is_named() -> None:
    program: LossProgram = parse_loss(uploaded(clipped, advantages=1, old=2))
    with pytest.raises(InputError, match=r"datum 0.*'old'.*rank 1.*created for rank 2"):
        check_pass(datums(), "custom", {}, vocab_size=259, max_context_length=256, program=program)
    plain = [Example(d.tokens, {"target_tokens": d.tokens}) for d in datums()]
    with pytest.raises(InputError, match=r"'advantages'.*missing.*'clipped' reads it"):
        check_pass(plain, "custom", {}, vocab_size=259, max_context_length=256, program=program)
