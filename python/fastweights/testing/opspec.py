"""The table that tests, benchmarks and the support matrix of an op are made from.

`fastweights/ops/<family>/spec.py` holds `SPECS: list[OpSpec]`, one entry per public op. It is data
with a few small functions; everything that is done with it is in `fastweights.testing.checks` (the
generic tests), `fastweights.testing.bench` and `fastweights.testing.support`.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "BadInput",
    "BenchCase",
    "OpSpec",
    "Peer",
    "Sample",
    "Tolerance",
    "all_specs",
    "sample",
]


class Sample(NamedTuple):
    """One call: `function(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map_tensors(self, change: Callable[[Tensor], Any]) -> Sample:
        """The sample with `change` applied to every tensor, also inside tuples, lists and dicts."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Sample(args, kwargs)

    def to(self, dtype: torch.dtype | None) -> Sample:
        """The sample with its floating tensors in another dtype; None leaves them."""
        return self.map_tensors(lambda t: t.to(dtype) if dtype and t.is_floating_point() else t)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the call."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def __str__(self) -> str:
        def text(value: Any) -> str:
            if isinstance(value, Tensor):
                dtype = str(value.dtype).removeprefix("torch.")
                return f"{dtype}{list(value.shape)}"
            return repr(value)

        parts = pytree.tree_map(text, (list(self.args), self.kwargs))
        words = [str(part) for part in parts[0]] + [f"{k}={v}" for k, v in parts[1].items()]
        return "(" + ", ".join(words).replace("'", "") + ")"


def sample(*args: Any, **kwargs: Any) -> Sample:
    """`sample(q, k, v, scale=1.0)` is the call `f(q, k, v, scale=1.0)`."""
    return Sample(args, kwargs)


class Tolerance(NamedTuple):
    """Largest error, in units of `|expected| + rms(expected)`, of outputs and of gradients."""

    output: float
    gradient: float


class BadInput(NamedTuple):
    """`call()` must raise `exception` with a message that matches the regular expression."""

    call: Callable[[], object]
    exception: type[Exception]
    message: str


@dataclass(frozen=True)
class Peer:
    """A rival for the benchmark.

    Args:
        name: as printed, such as "torch SDPA".
        load: returns the function to time; raises ImportError if it is not installed. It is called
            as `function(*args, **kwargs)` with the sample that `adapt` made of ours.
        adapt: turns our call into the peer's; returns None where the peer cannot do the case.
            Copies and transposes belong here: `adapt` is not timed.
        matmul: the peer spends its time in torch's float32 matmul and is therefore timed at both
            `torch.set_float32_matmul_precision` "highest" and "medium".
        backward: whether its backward is timed too.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    adapt: Callable[[Sample], Sample | None]
    matmul: bool = False
    backward: bool = True


@dataclass(frozen=True)
class BenchCase:
    """One shape to time.

    Args:
        name: as printed, such as "B1 H8 T4096 D64".
        make: returns the call for a dtype; only called when the case runs.
        flops: multiplications and additions of the forward, as the fused algorithm does them.
        bytes: smallest memory traffic of the forward, for float32 elements.
        rows: tokens times heads (B * T * H), for the column "ns per token and head"; 0: no column.
        dtypes: dtypes to time.
        backward: whether forward + backward is timed too (never for ops without gradients).
        reference: whether the reference is timed (leave out where it would take minutes).
        copies: calls to make, which are timed in turn: with enough of them the tensors come from
            memory, as the layers of a model do, and not from a cache.
    """

    name: str
    make: Callable[[torch.dtype], Sample]
    flops: float
    bytes: float
    rows: int = 0
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    backward: bool = True
    reference: bool = True
    copies: int = 1


@dataclass(frozen=True)
class OpSpec:
    """One public op.

    Args:
        name: the op's name, `fastweights.functional.<name>`.
        family: its package in `fastweights.ops`.
        function: the public function.
        reference: the same function in plain torch: same parameters (those of `function` whose
            names start with an underscore aside), layout and defaults. It must be differentiable
            by torch's autograd and follow float64 inputs with float64 arithmetic.
        samples: small calls for a dtype: odd lengths, lengths above and below a chunk, K != V,
            groups, each optional argument on and off, and at least one empty tensor. Called anew
            for every check, so it must seed its own generator. Keep all of them together under
            about 0.2 s for function, reference and both backwards.
        tolerances: per supported dtype; what is not listed is not supported and must raise.
        differentiable: parameters with a gradient; each may hold a tensor or a tuple of them.
        mutates: parameters changed in place, by the reference too.
        forms: name -> extra keyword arguments of `function` that force one algorithm. Each is held
            against the reference and through gradcheck.
        gradcheck: float64 calls for gradcheck, long enough for the chunked form (T >= 2C + 3).
            Every form gets every call; default: no gradcheck (only for ops without gradients).
        bad_inputs: wrong calls and the message each gives, by the public function and by
            `torch.ops.fastweights`.
        time: for recurrences: the parameters sliced along dimension 1 (those with one dimension are
            passed whole) when a call is split in two. The op takes `initial_state` and
            `output_final_state` and returns `(o, final_state)`.
        step: for recurrences: the one-token op, `step(*time arguments at t, state=...)`, which
            must continue a prefix. It is called with every keyword of the sample that it accepts.
        bench: shapes for `fastweights bench`.
        peers: rivals in the benchmark.
        matmul: as of `Peer`: the op itself leaves its time to torch's float32 matmul.
        oracle_dtype: dtype that floating arguments are widened to for the reference; None leaves
            them (for ops whose result depends on the dtype, such as quantizers).
        sums_by_order: what is summed in an order that the memory order of the arguments decides,
            "outputs" or "gradients": other strides then give it within tolerance, not bit for bit.
        exports: False where torch.export itself fails on the function, which torch.compile serves.
    """

    name: str
    family: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.dtype], Sequence[Sample]]
    tolerances: Mapping[torch.dtype, Tolerance]
    differentiable: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    forms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gradcheck: Callable[[], Sequence[Sample]] = tuple
    bad_inputs: Sequence[BadInput] = ()
    time: tuple[str, ...] = ()
    step: Callable[..., Any] | None = None
    bench: Sequence[BenchCase] = ()
    peers: Sequence[Peer] = ()
    matmul: bool = False
    oracle_dtype: torch.dtype | None = torch.float64
    sums_by_order: tuple[str, ...] = ()
    exports: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def first_dtype(self) -> torch.dtype:
        """float32 where the op has it: the dtype of checks that need only one."""
        return torch.float32 if torch.float32 in self.tolerances else next(iter(self.tolerances))

    def bind(self, call: Sample) -> dict[str, Any]:
        """Parameter name -> argument, without defaults."""
        return dict(inspect.signature(self.function).bind(*call.args, **call.kwargs).arguments)


def all_specs() -> list[OpSpec]:
    """Every spec of every family, in the order of family and file."""
    import fastweights.ops

    specs: list[OpSpec] = []
    for family in sorted(module.name for module in pkgutil.iter_modules(fastweights.ops.__path__)):
        name = f"fastweights.ops.{family}.spec"
        if not family.startswith("_") and importlib.util.find_spec(name) is not None:
            specs += importlib.import_module(name).SPECS
    return specs
