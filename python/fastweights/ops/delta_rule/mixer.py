"""What the layers of the delta rule share: projections, short convolutions, padding, the output."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.ops import _common
from fastweights.ops._mixers import check_mode, with_padding, without_padding
from fastweights.ops.causal_conv1d.layers import ShortConvolution
from fastweights.ops.causal_conv1d.reference import Activation
from fastweights.ops.delta_rule.functional import delta_rule, delta_rule_step
from fastweights.ops.norms.layers import RMSNorm, RMSNormGated

__all__ = ["DeltaMixer", "DeltaState", "decay_rate", "integer", "time_step", "without_weight_decay"]

_MODES = ("chunk", "fused_recurrent")


class DeltaState(NamedTuple):
    """The decoding state of a layer: plain tensors of a size that no context length changes.

    Attributes:
        memory: S, `[B, HV, K, V]`, float32 (float64 for a float64 layer).
        convolutions: The latest inputs of the short convolutions of q, k and v, each
            `[B, channels, conv_size - 1]` in the layer's dtype; empty without them.
    """

    memory: Tensor
    convolutions: tuple[Tensor, ...]


def integer(kind: str, product: str, value: float) -> int:
    """The integer that `value` is but for rounding.

    Raises:
        ValueError: It is none; `product` says what was multiplied.
    """
    if value < 1 or not math.isclose(value, round(value), rel_tol=1e-5):
        raise ValueError(f"{kind}: expected {product} to be an integer above 0, got {value:g}")
    return round(value)


def decay_rate(heads: int, low: float) -> nn.Parameter:
    """`A_log` of exp(A_log) uniform in (low, 16), without weight decay."""
    return without_weight_decay(torch.empty(heads, dtype=torch.float32).uniform_(low, 16).log())


def time_step(size: int) -> nn.Parameter:
    """`dt_bias` whose softplus is log-uniform in (1e-3, 1e-1), without weight decay."""
    low, high = math.log(1e-3), math.log(1e-1)
    dt = torch.exp(torch.rand(size, dtype=torch.float32) * (high - low) + low)
    return without_weight_decay(dt + torch.log(-torch.expm1(-dt)))


def without_weight_decay(values: Tensor) -> nn.Parameter:
    """A parameter with the mark that the training scripts of fla and Mamba look for."""
    parameter = nn.Parameter(values)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


class DeltaMixer(nn.Module):
    """Projections to q, k, v, their short convolutions, a delta rule, a norm and a projection.

    A layer builds the parts in fla's order, so that one seed gives both the same weights, and says
    in `_gates` what else its rule takes.

    Args:
        mode: "chunk" or "fused_recurrent". Checked only: the op chooses its algorithm by shape.
        hidden_size: Width D of the input and the output.
        num_heads: Heads H of q and k.
        num_v_heads: Heads HV of v, a multiple of H; None is H. Value head h reads query and key
            head h // (HV / H).
        head_k_dim: K.
        head_v_dim: V.
        layer_idx: Kept for compatibility; a state is passed, not looked up.

    Raises:
        ValueError: Sizes that do not fit, or another mode.
    """

    qk_activation = "silu"
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    q_conv1d: ShortConvolution
    k_conv1d: ShortConvolution
    v_conv1d: ShortConvolution
    g_proj: nn.Module | None
    o_norm: RMSNorm

    def __init__(
        self,
        mode: str,
        hidden_size: int,
        num_heads: int,
        num_v_heads: int | None,
        head_k_dim: int,
        head_v_dim: int,
        layer_idx: int | None,
    ) -> None:
        super().__init__()
        self.kind = type(self).__name__
        check_mode(self.kind, mode, _MODES)
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        if num_heads < 1 or num_v_heads < 1 or num_v_heads % num_heads:
            raise ValueError(
                f"{self.kind}: expected num_v_heads to be a multiple of num_heads = {num_heads}, "
                f"got {num_v_heads}"
            )
        self.hidden_size = hidden_size
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.head_k_dim, self.head_v_dim = head_k_dim, head_v_dim
        self.key_dim, self.value_dim = num_heads * head_k_dim, num_v_heads * head_v_dim
        self.layer_idx = layer_idx

    def _linear(self, width: int) -> nn.Linear:
        return nn.Linear(self.hidden_size, width, bias=False)

    def _low_rank(self, width: int, bias: bool) -> nn.Sequential:
        return nn.Sequential(
            self._linear(self.head_v_dim), nn.Linear(self.head_v_dim, width, bias=bias)
        )

    def _build_projections(self, writes: int = 1) -> None:
        """q, k and v, the latter two `writes` times a token."""
        self.q_proj = self._linear(self.key_dim)
        self.k_proj = self._linear(self.key_dim * writes)
        self.v_proj = self._linear(self.value_dim * writes)

    def _build_convolutions(self, use: bool, size: int, bias: bool, writes: int = 1) -> None:
        self.use_short_conv = use
        if not use:
            return
        if size < 1:
            raise ValueError(f"{self.kind}: expected conv_size >= 1, got {size}")
        qk: Activation = "silu" if self.qk_activation == "silu" else None
        self.q_conv1d = ShortConvolution(self.key_dim, size, bias, qk)
        self.k_conv1d = ShortConvolution(self.key_dim * writes, size, bias, qk)
        self.v_conv1d = ShortConvolution(self.value_dim * writes, size, bias, "silu")

    def _build_output(self, gate: nn.Module | None, activation: str, eps: float) -> None:
        """The norm per head, gated if there is a gate, and the projection."""
        self.g_proj = gate
        if gate is None:
            self.o_norm = RMSNorm(self.head_v_dim, eps)
        elif activation in ("silu", "swish"):
            self.o_norm = RMSNormGated(self.head_v_dim, eps)
        else:
            self.o_norm = RMSNormGated(self.head_v_dim, eps, activation="sigmoid")
        self.o_proj = nn.Linear(self.value_dim, self.hidden_size, bias=False)

    @property
    def _convolutions(self) -> tuple[ShortConvolution, ...]:
        return (self.q_conv1d, self.k_conv1d, self.v_conv1d) if self.use_short_conv else ()

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _activate(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """What is left of the convolutions where there are none."""
        if self.qk_activation == "silu":
            q, k = F.silu(q), F.silu(k)
        return q, k, F.silu(v)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[..., H, K]`, `[..., H, K]` and `[..., HV, V]`."""
        return (
            q.unflatten(-1, (-1, self.head_k_dim)),
            k.unflatten(-1, (-1, self.head_k_dim)),
            v.unflatten(-1, (-1, self.head_v_dim)),
        )

    def _gates(self, x: Tensor) -> dict[str, Any]:
        """The arguments of the delta rule besides q, k, v and the state, from x `[..., D]`."""
        raise NotImplementedError

    def _rule(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, **states: Any
    ) -> tuple[Tensor, Tensor | None]:
        return delta_rule(q, k, v, **self._gates(x), **states)

    def _rule_step(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor) -> Tensor:
        return delta_rule_step(q, k, v, **self._gates(x), state=memory)

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        if self.g_proj is None:
            o = self.o_norm(o)
        else:
            o = self.o_norm(o, self.g_proj(x).view(o.shape))
        y: Tensor = self.o_proj(o.flatten(-2))
        return y

    def forward(
        self,
        x: Tensor,
        initial_state: DeltaState | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, DeltaState | None]:
        """Mix x `[B, T, D]`.

        Args:
            x: The input.
            initial_state: State of every sequence before its first token; zeros by default.
            output_final_state: Also return the state after the last token.
            cu_seqlens: int32 or int64 `[N + 1]`, B = 1: sequence n is tokens cu_seqlens[n] to
                cu_seqlens[n + 1] - 1.
            attention_mask: `[B, T]` of 0 and 1 or bool: where it is 0 there is padding, on either
                side, which no token and no state sees and whose output is 0.

        Returns:
            y `[B, T, D]`, and the state or None.

        Raises:
            ValueError: Both cu_seqlens and attention_mask, or a mask or state that does not fit.
        """
        if attention_mask is None:
            return self._mix(x, initial_state, output_final_state, cu_seqlens)
        if cu_seqlens is not None:
            raise ValueError(f"{self.kind}: expected cu_seqlens or attention_mask, got both")
        tokens, cu_seqlens, places = without_padding(self.kind, x, attention_mask)
        y, state = self._mix(tokens, initial_state, output_final_state, cu_seqlens)
        return with_padding(y, places, attention_mask.shape), state

    def _mix(
        self,
        x: Tensor,
        initial_state: DeltaState | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, DeltaState | None]:
        convolutions = self._convolutions
        memory: Tensor | None = None
        before: tuple[Tensor | None, ...] = (None,) * len(convolutions)
        if initial_state is not None:
            memory, before = initial_state
            if len(before) != len(convolutions):
                raise ValueError(
                    f"{self.kind}: expected initial_state of {len(convolutions)} convolutions, "
                    f"got {len(before)}"
                )
        signals, after = self._project(x), ()
        if convolutions:
            read = [
                convolution(signal, state, output_final_state, cu_seqlens)
                for convolution, signal, state in zip(convolutions, signals, before, strict=True)
            ]
            signals, after = zip(*read, strict=True)
        else:
            signals = self._activate(*signals)
        o, memory = self._rule(
            x,
            *self._heads(*signals),
            initial_state=memory,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
        return self._output(o, x), None if memory is None else DeltaState(memory, after)

    def step(self, x: Tensor, state: DeltaState) -> Tensor:
        """Mix one token per sequence, x `[B, D]`, and update the state in place."""
        signals = self._project(x)
        if self.use_short_conv:
            signals = tuple(
                convolution.step(signal, latest)
                for convolution, signal, latest in zip(
                    self._convolutions, signals, state.convolutions, strict=True
                )
            )
        else:
            signals = self._activate(*signals)
        o = self._rule_step(x, *self._heads(*signals), state.memory)
        return self._output(o, x)

    def init_state(self, batch: int) -> DeltaState:
        """The state of `batch` sequences before their first token."""
        weight = self.q_proj.weight
        memory = torch.zeros(
            batch,
            self.num_v_heads,
            self.head_k_dim,
            self.head_v_dim,
            dtype=_common.state_dtype(weight.dtype),
            device=weight.device,
        )
        return DeltaState(memory, tuple(c.init_state(batch) for c in self._convolutions))
