"""What the mixers of this family share: projections to heads, and a state with a position."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODES", "PositionedState", "ProjectedHeads", "activation", "single_tensor"]

MODES = ("chunk", "fused_chunk", "fused_recurrent", "parallel")

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function of that name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def single_tensor(state: Tensor | tuple[Tensor, Tensor] | None) -> Tensor | None:
    """The state of an op that was not asked to normalise, whose type says more than it is."""
    if isinstance(state, tuple):
        raise TypeError("linear_attention: expected a state of one tensor, got (S, z)")
    return state


class PositionedState(NamedTuple):
    """The decoding state of a mixer whose queries and keys depend on their position.

    Attributes:
        memory: The recurrent state S, `[B, H, K, V]`.
        position: The position that the next token will have, int64 `[B]`.
    """

    memory: Tensor
    position: Tensor


class ProjectedHeads(nn.Module):
    """The q, k, v projections of a mixer with H query heads and H/groups key and value heads.

    Args:
        hidden_size: Width D of the input.
        num_heads: H.
        num_kv_heads: Heads of k and v, a divisor of H; default H. Query head h reads head
            h // (H / num_kv_heads).
        expand_k: K·H / D.
        expand_v: V·H / D.
        bias: Whether the projections have one.

    Raises:
        ValueError: Sizes that do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"{kind}: expected num_kv_heads to divide num_heads = {num_heads}, "
                f"got {num_kv_heads}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_groups = num_heads // num_kv_heads
        self.key_dim = int(hidden_size * expand_k)
        self.value_dim = int(hidden_size * expand_v)
        for name, width in (("expand_k", self.key_dim), ("expand_v", self.value_dim)):
            if width < num_heads or width % num_heads:
                raise ValueError(
                    f"{kind}: expected hidden_size * {name} to be a multiple of num_heads = "
                    f"{num_heads}, got {width}"
                )
        self.head_k_dim = self.key_dim // num_heads
        self.head_v_dim = self.value_dim // num_heads
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, self.key_dim // self.num_kv_groups, bias=bias)
        self.v_proj = nn.Linear(hidden_size, self.value_dim // self.num_kv_groups, bias=bias)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map x `[..., D]` to q `[..., H, K]` and k, v of H/groups heads."""
        return (
            self.q_proj(x).unflatten(-1, (-1, self.head_k_dim)),
            self.k_proj(x).unflatten(-1, (-1, self.head_k_dim)),
            self.v_proj(x).unflatten(-1, (-1, self.head_v_dim)),
        )

    def _repeat(self, x: Tensor) -> Tensor:
        """Copy `[..., H/groups, ·]` key, value or gate heads for their H query heads."""
        return x if self.num_kv_groups == 1 else x.repeat_interleave(self.num_kv_groups, dim=-2)

    def _zeros(self, *shape: int) -> Tensor:
        """A part of an initial state: float32 (float64 for a float64 module) on its device."""
        weight = self.q_proj.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    def _start(self, batch: int) -> Tensor:
        return torch.zeros(batch, dtype=torch.int64, device=self.q_proj.weight.device)
