"""Custom loss operations: the table of every call a graph may contain and its arguments' kinds.

A graph cannot reach anything outside this table. Operations that draw random numbers, write in
place, read or write outside of the graph, or turn tensors into Python values are absent on purpose.
No torch: the service parses graphs, and the worker evaluates them.

Kinds of arguments
    t  a tensor                      v  a tensor or a number       n  a number
    i  an integer                    b  true or false              l  a list of tensors
    d  one or several dimensions     s  sizes, also as several arguments (the last parameter)
    y  a dtype                       a  a dtype, device or tensor (of ``to``), also several
    x  an index                      k  numbers in nested lists    c  ignored, because losses
    w  a word of `WORDS`             z  None                          run on the CPU
    1  the number 1                  0  false

A ``?`` makes an argument optional, and None is then allowed as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Surface = Literal["torch", "method", "functional", "operator", "math", "special", "linalg"]
WORDS = frozenset({"none", "sum", "mean", "trunc", "floor", "tanh", "constant"})
ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "T", "mT", "values", "indices"})
"""Attributes that ``getattr`` may read."""
DTYPES = frozenset({"float32", "float64", "bfloat16", "float16", "int64", "int32", "bool"})
SPREADS = "sa"
"""Kinds that take all remaining arguments."""

_EVERYWHERE = """
abs exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sigmoid tanh sin cos tan asin
acos atan sinh cosh asinh acosh atanh erf erfc sign sgn floor ceil trunc frac relu neg isnan isinf
isfinite logical_not detach clone positive t numel
    input:t
round input:t decimals:i?
logit input:t eps:n?
add sub subtract multiply mul input:v other:v alpha:n?
div divide true_divide input:v other:v rounding_mode:w?
floor_divide remainder fmod input:v other:v
pow input:v exponent:v
maximum minimum fmax fmin atan2 hypot logaddexp logaddexp2 xlogy input:t other:v
eq ne lt le gt ge not_equal less less_equal greater greater_equal input:v other:v
logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor input:t other:v
clamp clip input:t min:v? max:v?
clamp_min input:t min:v
clamp_max input:t max:v
masked_fill input:t mask:t value:v
masked_select input:t mask:t
nan_to_num input:t nan:n? posinf:n? neginf:n?
lerp input:t end:t weight:v
addcmul addcdiv input:t tensor1:t tensor2:t value:n?
sum mean nansum nanmean input:t dim:d? keepdim:b? dtype:y?
prod input:t dim:i? keepdim:b? dtype:y?
std var input:t dim:d? unbiased:b? keepdim:b? correction:n?
max min input:t dim:v? keepdim:b? other:t?
median input:t dim:i? keepdim:b?
amax amin input:t dim:d? keepdim:b?
logsumexp input:t dim:d keepdim:b?
softmax log_softmax input:t dim:i dtype:y?
any all input:t dim:d? keepdim:b?
argmax argmin input:t dim:i? keepdim:b?
count_nonzero input:t dim:d?
norm input:t p:n? dim:d? keepdim:b? out:z? dtype:y?
cumsum cumprod input:t dim:i dtype:y?
logcumsumexp input:t dim:i
sort argsort input:t dim:i? descending:b? stable:b?
topk input:t k:i dim:i? largest:b? sorted:b?
flip input:t dims:s
roll input:t shifts:d dims:d?
diff input:t n:1? dim:i? prepend:t? append:t?
reshape input:t shape:s
flatten input:t start_dim:i? end_dim:i?
squeeze input:t dim:d?
unsqueeze input:t dim:i
transpose swapaxes input:t dim0:i dim1:i
permute input:t dims:s
broadcast_to input:t size:s
narrow input:t dim:i start:i length:i
select input:t dim:i index:i
index_select gather input:t dim:i index:t
take_along_dim input:t indices:t dim:i?
split input:t split_size_or_sections:d dim:i?
chunk input:t chunks:i dim:i?
unbind input:t dim:i?
tril triu diagonal input:t diagonal:i?
matmul mm mv dot outer input:t other:t
"""
"""Functions of torch that are methods of tensors as well."""

_TORCH = """
where condition:t input:v other:v
cat concat concatenate stack tensors:l dim:i?
zeros ones size:s dtype:y? device:c? layout:c? requires_grad:c? pin_memory:c?
full size:d fill_value:v dtype:y? device:c? layout:c? requires_grad:c?
zeros_like ones_like input:t dtype:y? device:c? layout:c? memory_format:c? requires_grad:c?
full_like input:t fill_value:v dtype:y? device:c? layout:c? memory_format:c? requires_grad:c?
arange start:n end:n? step:n? dtype:y? device:c? layout:c? requires_grad:c?
tensor scalar_tensor data:k dtype:y? device:c? requires_grad:c?
"""

_METHOD = """
where input:t condition:t other:v
view expand repeat input:t size:s
expand_as view_as reshape_as type_as input:t other:t
contiguous input:t memory_format:c?
size input:t dim:i?
dim input:t
float double half bfloat16 long int bool input:t memory_format:c?
cpu input:t memory_format:c?
to input:t args:a dtype:y? device:c? non_blocking:c? copy:c? memory_format:c?
new_zeros new_ones input:t size:s dtype:y? device:c? layout:c? requires_grad:c?
new_full input:t size:d fill_value:v dtype:y? device:c? layout:c? requires_grad:c?
new_tensor input:t data:k dtype:y? device:c? requires_grad:c?
"""

_FUNCTIONAL = """
relu sigmoid tanh logsigmoid softsign input:t
silu input:t inplace:0?
leaky_relu input:t negative_slope:n? inplace:0?
elu input:t alpha:n? inplace:0?
gelu input:t approximate:w?
softplus input:t beta:n? threshold:n?
softmax log_softmax input:t dim:i? _stacklevel:c? dtype:y?
mse_loss l1_loss input:t target:t size_average:z? reduce:z? reduction:w? weight:t?
smooth_l1_loss input:t target:t size_average:z? reduce:z? reduction:w? beta:n?
huber_loss input:t target:t reduction:w? delta:n? weight:t?
kl_div input:t target:t size_average:z? reduce:z? reduction:w? log_target:b?
binary_cross_entropy input:t target:t weight:t? size_average:z? reduce:z? reduction:w?
binary_cross_entropy_with_logits
    input:t target:t weight:t? size_average:z? reduce:z? reduction:w? pos_weight:t?
cosine_similarity x1:t x2:t dim:i? eps:n?
normalize input:t p:n? dim:d? eps:n? out:z?
pad input:t pad:d mode:w? value:n?
"""

_OPERATOR = """
add sub mul truediv floordiv mod pow matmul eq ne lt le gt ge and_ or_ xor iadd isub imul itruediv
    a:v b:v
neg pos abs invert a:v
getitem a:v b:x
"""

_MATH = """
sqrt exp expm1 log1p log2 log10 fabs floor ceil trunc sin cos tan tanh sinh cosh erf erfc x:n
log x:n base:n?
pow x:n y:n
"""

_SPECIAL = """
expit log1p entr erf expm1 exp2 logit log_ndtr ndtr input:t
xlogy xlog1py input:t other:v
logsumexp input:t dim:d keepdim:b?
"""

_LINALG = "vector_norm norm input:t ord:n? dim:d? keepdim:b? out:z? dtype:y?"

ALIASES = {
    "torch.functional.": "torch.",
    "torch._C._nn.log_sigmoid": "torch.nn.functional.logsigmoid",
    "torch._C._nn.": "torch.nn.functional.",
    "torch._C._special.special_": "torch.special.",
    "torch._C._linalg.linalg_": "torch.linalg.",
}
"""Prefixes of torch.fx's function names and their public replacements. The first match counts."""


@dataclass(frozen=True)
class Parameter:
    """One argument of an operation. The module's docstring lists the values of ``kind``."""

    name: str
    kind: str
    optional: bool


@dataclass(frozen=True)
class Operation:
    """An operation that a graph may call.

    Attributes:
        surface: the module, or the methods of tensors, that it belongs to.
        name: its name there.
        parameters: its parameters in order.
    """

    surface: Surface
    name: str
    parameters: tuple[Parameter, ...]


def _parameter(text: str) -> Parameter:
    name, _, kind = text.partition(":")
    return Parameter(name, kind.rstrip("?"), kind.endswith("?"))


def _parse_rows(surface: Surface, rows: str) -> dict[str, Operation]:
    """Parse rows of names followed by parameters into operations by name."""
    found: dict[str, Operation] = {}
    names: list[str] = []
    parameters: list[Parameter] = []
    for word in [*rows.split(), ""]:
        if ":" in word:
            parameters.append(_parameter(word))
            continue
        if parameters or not word:
            found |= {name: Operation(surface, name, tuple(parameters)) for name in names}
            names, parameters = [], []
        names.append(word)
    return found


FUNCTIONS: Mapping[str, Operation] = {
    prefix + name: operation
    for prefix, surface, rows in (
        ("torch.", "torch", _EVERYWHERE + _TORCH),
        ("torch.nn.functional.", "functional", _FUNCTIONAL),
        ("torch.special.", "special", _SPECIAL),
        ("torch.linalg.", "linalg", _LINALG),
        ("operator.", "operator", _OPERATOR),
        ("math.", "math", _MATH),
    )
    for name, operation in _parse_rows(surface, rows).items()  # type: ignore[arg-type]
}
"""Functions by qualified name."""
METHODS: Mapping[str, Operation] = _parse_rows("method", _EVERYWHERE + _METHOD)
"""Methods of tensors. The first parameter is the tensor."""
GETATTR = Operation(
    "operator", "getattr", (Parameter("value", "v", False), Parameter("name", "attribute", False))
)
IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv"})
"""Operators that write to their first argument."""


def find_function(target: str) -> Operation | None:
    """Return the function of a qualified name, or None if a graph may not call it."""
    if target == "getattr":
        return GETATTR
    for alias, name in ALIASES.items():
        if target.startswith(alias):
            target = name + target.removeprefix(alias)
            break
    return FUNCTIONS.get(target)
