"""What the optimizers have in common: states, overrides, one call of the op per kind of step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fastweights.ops.optim.functional import optimizer_step
from fastweights.ops.optim.reference import Rule
from fastweights.optim.layout import maps_of, with_maps, without_maps
from fastweights.optim.overrides import GlobalOptimManager

__all__ = ["BlockwiseOptimizer"]


class _Kind(NamedTuple):
    """What the parameters of one call of the op share."""

    coded: bool
    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    block_size: int
    stochastic_rounding: bool


class BlockwiseOptimizer(Optimizer):
    """An optimizer whose rule the op `optimizer_step` knows.

    A subclass says which rule and, per state, whether it has a sign. Every hyperparameter may
    differ by group and, through `GlobalOptimManager`, by parameter.
    """

    rule: ClassVar[Rule]
    signs: ClassVar[tuple[bool, ...]]

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        optim_bits: int,
        min_8bit_size: int,
        block_size: int,
        stochastic_rounding: bool,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "optim_bits": optim_bits, "min_8bit_size": min_8bit_size, "block_size": block_size,
            "stochastic_rounding": stochastic_rounding,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, and check its hyperparameters."""
        super().add_param_group(param_group)
        self._check(self.param_groups[-1])

    def _check(self, config: dict[str, Any]) -> None:
        name = type(self).__name__
        if config["optim_bits"] not in (8, 32):
            raise ValueError(f"{name}: expected optim_bits 8 or 32, got {config['optim_bits']}")
        for key in ("lr", "eps", "weight_decay"):
            if not config[key] >= 0:
                raise ValueError(f"{name}: expected {key} >= 0, got {config[key]}")
        if not all(0 <= beta < 1 for beta in config["betas"]):
            raise ValueError(f"{name}: expected 0 <= beta < 1 in betas, got {config['betas']}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss anew and returns it.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a gradient that is sparse or does not fit its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        overrides = GlobalOptimManager.get_instance().overrides()
        kinds: dict[_Kind, list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    config = group | overrides[id(p)] if id(p) in overrides else group
                    state = self.state[p]
                    kinds[self._advanced(p, state, config)].append((p, state))
        for kind, moving in kinds.items():
            self._take(kind, moving)
        return loss

    def _advanced(self, p: Tensor, state: dict[str, Any], config: dict[str, Any]) -> _Kind:
        """Count the step of a parameter, whose state begins here, and say what kind it is."""
        if not state:
            self._check(config)
            self._begin(p, state, config)
        state["step"] += 1
        beta1, beta2 = config["betas"]
        return _Kind(
            "absmax1" in state, int(state["step"]), float(config["lr"]), beta1, beta2,
            config["eps"], config["weight_decay"], config["block_size"],
            config["stochastic_rounding"],
        )  # fmt: skip

    def _begin(self, p: Tensor, state: dict[str, Any], config: dict[str, Any]) -> None:
        state["step"] = 0
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        coded = config["optim_bits"] == 8 and p.numel() >= config["min_8bit_size"]
        for i, signed in enumerate(self.signs, 1):
            if coded and wide == torch.float32:
                blocks = -(-p.numel() // config["block_size"])
                zero = 127 if signed else 0
                state[f"state{i}"] = torch.full(p.shape, zero, dtype=torch.uint8, device=p.device)
                state[f"absmax{i}"] = torch.zeros(blocks, device=p.device)
            else:
                state[f"state{i}"] = torch.zeros(p.shape, dtype=wide, device=p.device)

    def _take(self, kind: _Kind, moving: list[tuple[Tensor, dict[str, Any]]]) -> None:
        params = [p for p, _ in moving]

        def of(key: str) -> list[Tensor]:
            return [state[key] for _, state in moving if key in state]

        grads = [p.grad for p in params if p.grad is not None]
        if any(g.layout != torch.strided for g in grads):
            raise RuntimeError(f"{type(self).__name__}: expected dense gradients, got sparse ones")
        # The states are in logical order, whatever the strides of the parameter.
        targets = [p if p.is_contiguous() else p.contiguous() for p in params]
        seed = torch.randint(2**63 - 1, (1,)) if kind.stochastic_rounding else None
        optimizer_step(
            targets, grads, of("state1"), of("state2"), of("absmax1"), of("absmax2"),
            rule=self.rule, step=kind.step, lr=kind.lr, beta1=kind.beta1, beta2=kind.beta2,
            eps=kind.eps, weight_decay=kind.weight_decay, block_size=kind.block_size, seed=seed,
        )  # fmt: skip
        for p, target in zip(params, targets, strict=True):
            if p is not target:
                p.copy_(target)
        # So that autograd notices a backward through the values of before the step.
        torch.autograd.graph.increment_version(params)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the states in the layout of bitsandbytes, which loads it."""
        saved = super().state_dict()
        maps = maps_of(self.signs)
        saved["state"] = {i: with_maps(state, maps) for i, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or in bitsandbytes.

        What bitsandbytes does not save, such as `block_size`, is as it was given to the
        constructor.

        Raises:
            ValueError: other groups, another layout, other maps or blocks of another size.
        """
        saved = state_dict["state"]
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        maps = maps_of(self.signs)
        states = {
            p: without_maps(saved[i], maps, p, group["block_size"])
            for i, (p, group) in zip(indices, params, strict=False)
            if i in saved
        }
        # torch would cast float32 states to the dtype of the parameter.
        super().load_state_dict(state_dict | {"state": {}})
        self.state.update(states)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
