"""A model block by block: what goes into each, behind the blocks that have been changed so far."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastweights.ops.quantization.layers import QuantizedLinear
from fastweights.ops.quantization.tensor import QuantizedTensor
from fastweights.quantization.samples import Sample

__all__ = ["Block", "Call", "Walk", "hooked", "set_module", "tensors_of"]


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block."""

    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, module: nn.Module) -> Any:
        """The block's output."""
        return module(*_first_copied(self.args), **self.options)


@dataclass
class Block:
    """A part of a model that is solved at once.

    Args:
        name: in the model.
        module: the part itself.
        linears: what to quantize, by the name within the block; "" is the block itself.
        calls: one or more for every sample; none for solvers that look at no inputs.
        target: format, group size and activation, as `fastweights.quantize` takes them.
        tied: parameters that something outside of the block has, too; they must not be changed.
        exact: for solvers that compare: the block as it was, and its calls in the float model.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    calls: list[Call]
    target: dict[str, Any]
    tied: frozenset[nn.Parameter] = frozenset()
    exact: tuple[nn.Module, list[Call]] | None = None
    _times: dict[str, int] = field(default_factory=dict)

    def shared_inputs(self) -> list[list[str]]:
        """The linear layers in the order they run, those together that read the same tensor."""
        groups: list[tuple[Tensor, list[str]]] = []
        self._times = {}

        def hook(name: str) -> Any:
            def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
                self._times[name] = self._times.get(name, 0) + 1
                if self._times[name] == 1 and groups and groups[-1][0] is args[0]:
                    groups[-1][1].append(name)
                elif self._times[name] == 1:
                    groups.append((args[0], [name]))

            return note

        with hooked({self._submodule(name): hook(name) for name in self.linears}):
            self.calls[0].run(self.module)
        rest = [[name] for name in self.linears if name not in self._times]
        return [names for _, names in groups] + rest

    def inputs(self, name: str) -> Iterator[Tensor]:
        """Float32 inputs ``[tokens, K]`` of a layer of `linears`, one for every call of the block.

        There are no tokens where the call does not reach the layer, as experts know it.
        """
        return self._inputs(self._submodule(name), self.module, self.calls, name)

    def exact_inputs(self, name: str) -> Iterator[Tensor]:
        """The same in the float model."""
        assert self.exact is not None
        module, calls = self.exact
        return self._inputs(module.get_submodule(name), module, calls, name)

    def outputs(self, calls: Sequence[Call] | None = None) -> list[Tensor]:
        """The first tensor that the block returns, call by call."""
        chosen = self.calls if calls is None else calls
        return [tensors_of(call.run(self.module))[0] for call in chosen]

    def replace(self, name: str, weight: QuantizedTensor, order: Tensor | None = None) -> None:
        """Puts a quantized layer in the place of a linear one."""
        linear = self.linears[name]
        new = QuantizedLinear(weight, linear.bias, order).train(linear.training)
        if name:
            set_module(self.module, name, new)
        else:
            self.module = new

    def _submodule(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)

    def _inputs(
        self, linear: nn.Module, module: nn.Module, calls: list[Call], name: str
    ) -> Iterator[Tensor]:
        """Ends a forward pass as soon as the layer has been called as often as it will be."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            seen.append(args[0].flatten(0, -2).to(torch.float32, copy=True))
            if len(seen) == self._times.get(name):
                raise _Reached

        with hooked({linear: note}):
            for call in calls:
                with suppress(_Reached):
                    call.run(module)
                yield torch.cat(seen or [torch.zeros(0, self.linears[name].in_features)])
                seen.clear()


class Walk:
    """A model, its blocks and the samples that run through them.

    The outermost entries of its `nn.ModuleList`s are blocks, and so is every linear layer outside
    of them. Where a block's first argument is what the block before it returned, as in decoders,
    it is run on that, with other arguments as the float model or the block before had them; else
    the model is run from its beginning up to the block.

    Args:
        model: any module.
        linears: names of the layers to quantize.
        samples: for calibration; none for solvers that look at no inputs.
        target: see `Block`.
        compares: whether blocks come with `exact`.

    Memory: what the samples are between two blocks, and the other arguments of every block.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[str],
        samples: list[Sample],
        target: dict[str, Any],
        compares: bool = False,
    ) -> None:
        self.model, self.samples, self.target, self.compares = model, samples, target, compares
        self._linears: dict[str, list[str]] = {}
        for name in linears:
            block = _block_of(model, name)
            self._linears.setdefault(block, []).append(name[len(block) + 1 :])
        self._tied = _tied(model, [model.get_submodule(name) for name in self._linears])
        self._survey = _Survey(model, list(self._linears), samples, keep=compares)

    @property
    def names(self) -> list[str]:
        """Of the blocks, in the order they run."""
        return self._survey.order

    def blocks(self) -> Iterator[Block]:
        """The blocks in the order they run; whoever asks may change each before the next."""
        survey, rows, exact_rows = self._survey, None, None
        previous: tuple[str, list[Call]] | None = None
        for name, following in zip(survey.order, [*survey.order[1:], None], strict=True):
            module = self.model.get_submodule(name)
            linears: dict[str, nn.Linear] = {}
            for inner in self._linears[name]:
                linear = module.get_submodule(inner)
                assert isinstance(linear, nn.Linear)
                linears[inner] = linear
            calls = survey.calls(name) if rows is None else survey.chain(name, rows, previous)
            block = Block(name, module, linears, calls, self.target, self._tied)
            previous = name, calls
            if self.compares:
                noted = survey.noted(name)
                if exact_rows is not None:
                    noted = survey.chain(name, exact_rows)
                block.exact = copy.deepcopy(module), noted
            yield block
            if block.module is not module:
                set_module(self.model, name, block.module)
            rows = exact_rows = None
            if following is not None and survey.chained(following):
                rows = block.outputs()
                if block.exact is not None:
                    exact, calls = block.exact
                    exact_rows = [tensors_of(call.run(exact))[0] for call in calls]


class _Survey:
    """A pass of every sample over the model as it is: which block runs when, on what."""

    def __init__(
        self, model: nn.Module, names: list[str], samples: list[Sample], keep: bool
    ) -> None:
        self.model, self.samples = model, samples
        self.order: list[str] = [] if samples else names
        self._calls: dict[str, list[Call]] = {name: [] for name in names}
        self._counts: list[dict[str, int]] = []
        self._unchained: set[str] = set()
        modules = {model.get_submodule(name): name for name in names}
        latest: tuple[str, list[Tensor]]

        def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            name, counts = modules[module], self._counts[-1]
            counts[name] = counts.get(name, 0) + 1
            if name not in self.order:
                self.order.append(name)
            place = self.order.index(name)
            starts = place == 0 and counts[name] == 1
            follows = place > 0 and _follows(self.order[place - 1], latest, args, options)
            if not (starts or follows):
                self._unchained.add(name)
            self._calls[name].append(Call(_first_copied(args), options))

        def after(module: nn.Module, args: Any, options: Any, output: Any) -> None:
            nonlocal latest
            leaves = pytree.tree_leaves(output)
            latest = modules[module], [t for t in leaves if isinstance(t, Tensor)]

        with hooked(dict.fromkeys(modules, before), dict.fromkeys(modules, after)):
            for sample in samples:
                latest = "", []
                self._counts.append({})
                sample.run(model)
                self._drop_first_arguments(keep)
        for name in names if samples else ():
            if name not in self.order:
                raise ValueError(
                    f"quantize_: expected calibration to reach {name}, which it does not; skip it"
                )
            if len(self._calls[name]) != len(samples):
                self._unchained.add(name)
            dropped = any(call.args and call.args[0] is None for call in self._calls[name])
            if keep and dropped and not self.chained(name):  # only a later sample showed it
                self._calls[name] = self._captured(name)

    def _drop_first_arguments(self, keep: bool) -> None:
        """Of the calls that can be told from the block before, so that memory stays bounded."""
        for name in self.order[1:]:
            if not keep or self.chained(name):
                calls = self._calls[name]
                new = slice(len(calls) - self._counts[-1].get(name, 0), None)
                calls[new] = [Call((None, *c.args[1:]), c.options) for c in calls[new]]

    def chained(self, name: str) -> bool:
        """Whether a block always runs once, on what the block before it in `order` returns."""
        return name not in self._unchained

    def noted(self, name: str) -> list[Call]:
        """The calls of a block in the float model; without first arguments where chained."""
        return self._calls[name]

    def calls(self, name: str) -> list[Call]:
        """The calls of a block that is not chained, or the first, in the model as it is now."""
        return self._calls[name] if self.chained(name) else self._captured(name)

    def chain(
        self, name: str, rows: list[Tensor], previous: tuple[str, list[Call]] | None = None
    ) -> list[Call]:
        """The calls of a block whose first arguments are `rows`.

        The others are those of the float model, but where the `previous` block had the same tensor
        and has another one now.
        """
        calls = []
        for i, (x, call) in enumerate(zip(rows, self._calls[name], strict=True)):
            arguments = call.args[1:], call.options
            if previous is not None:
                old, new = self._calls[previous[0]], previous[1]
                if len(old) == len(new):
                    arguments = _renewed(arguments, old[i], new[i])
            calls.append(Call((x, *arguments[0]), arguments[1]))
        return calls

    def _captured(self, name: str) -> list[Call]:
        """The calls of a block in the model as it is now."""
        calls: list[Call] = []
        here: list[Call] = []
        for sample, counts in zip(self.samples, self._counts, strict=True):

            def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
                here.append(Call(_first_copied(args), options))
                if len(here) == counts.get(name, 0):  # noqa: B023 - called within this turn
                    raise _Reached

            with hooked({self.model.get_submodule(name): note}), suppress(_Reached):
                sample.run(self.model)
            calls += here
            here.clear()
        return calls


class _Reached(Exception):
    """Ends a forward pass of which nothing more is needed."""


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of whatever a module returns.

    Raises:
        ValueError: there are none, or in a class that torch cannot look into.
    """
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError(
            "quantize_: expected tensors in what a block returns, "
            f"got {type(output).__name__} (tuples, lists and mappings are looked into)"
        )
    return tensors


@contextmanager
def hooked(
    before: Mapping[nn.Module, Callable[..., None]],
    after: Mapping[nn.Module, Callable[..., None]] | None = None,
) -> Iterator[None]:
    """Within the context, modules call functions before and after they run."""
    handles = [m.register_forward_pre_hook(f, with_kwargs=True) for m, f in before.items()]
    handles += [m.register_forward_hook(f, with_kwargs=True) for m, f in (after or {}).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def set_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Puts a module into the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)


def _first_copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Blocks may write to their first argument, ``x += ...``."""
    return tuple(x.clone() if not i and isinstance(x, Tensor) else x for i, x in enumerate(args))


def _follows(
    previous: str, latest: tuple[str, list[Tensor]], args: tuple[Any, ...], options: dict[str, Any]
) -> bool:
    """Whether a call's first argument, and no other, comes straight from the previous block."""
    name, outputs = latest
    if name != previous or not args or not outputs or args[0] is not outputs[0]:
        return False
    others = pytree.tree_leaves((args[1:], options))
    return not any(a is b for a in others for b in outputs)


def _renewed(arguments: Any, old: Call, new: Call) -> Any:
    """Arguments with every tensor of an old call replaced by what stands there in the new one."""
    before = pytree.tree_leaves((old.args[1:], old.options))
    after = pytree.tree_leaves((new.args[1:], new.options))
    if len(before) != len(after):
        return arguments
    fresh = {id(a): b for a, b in zip(before, after, strict=True) if isinstance(a, Tensor)}
    return pytree.tree_map(lambda leaf: fresh.get(id(leaf), leaf), arguments)


def _tied(model: nn.Module, blocks: list[nn.Module]) -> frozenset[nn.Parameter]:
    """Parameters that several blocks have, or a block and what lies outside of all."""
    outside: set[nn.Parameter] = set()
    seen, left = set(blocks), [model]
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            outside.update(module.parameters(recurse=False))
            left += module.children()
    owners = Counter(outside)
    for block in blocks:
        owners.update(block.parameters())
    return frozenset(p for p, count in owners.items() if count > 1)


def _block_of(model: nn.Module, name: str) -> str:
    """The outermost entry of an `nn.ModuleList` that holds a layer, or the layer itself.

    Entries that are containers themselves are never called; theirs are.
    """
    parts, listed = name.split("."), False
    for end in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:end]))
        listed = listed or isinstance(module, nn.ModuleList)
        if listed and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return ".".join(parts[:end])
    return name
