"""TransNormer: attention without a denominator, and attention inside blocks (arXiv:2210.10340).

The entry points are those of `layers.py`: forward, step, init_state.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastweights.ops.linear_attention.functional import linear_attention, linear_attention_step
from fastweights.ops.linear_attention.heads import PositionedState, ProjectedHeads, single_tensor
from fastweights.ops.linear_attention.positions import (
    LRPE,
    check_cu_seqlens,
    final_positions,
    token_positions,
    token_sequences,
)
from fastweights.ops.norms.layers import SRMSNorm

__all__ = ["BlockState", "DiagAttention", "NormAttention", "TransNormerBlock"]

Variant = Literal["t1", "t2"]


class BlockState(NamedTuple):
    """The decoding state of `DiagAttention`: the keys and values of the current block.

    Attributes:
        k: Keys `[B, block_size, H, K]`; the first `position % block_size` of them count.
        v: Values `[B, block_size, H, V]`, likewise.
        position: The position that the next token will have, int64 `[B]`.
    """

    k: Tensor
    v: Tensor
    position: Tensor


class _TransNormerAttention(ProjectedHeads):
    """The projections, position map and initial weights of both mixers; keys are the authors'."""

    def __init__(
        self, hidden_size: int, num_heads: int, variant: Variant, lrpe: bool, gain: float
    ) -> None:
        super().__init__(hidden_size, num_heads, bias=True)
        if variant not in ("t1", "t2"):
            raise ValueError(
                f'{type(self).__name__}: expected variant "t1" or "t2", got {variant!r}'
            )
        self.variant = variant
        self.urpe = LRPE(self.head_k_dim) if lrpe else None
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=gain)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def _position(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.urpe is None:
            return x
        mapped: Tensor = self.urpe(x, positions)
        return mapped


class NormAttention(_TransNormerAttention):
    """Linear attention whose denominator is replaced by a norm of the output.

    o_t = SRMSNorm(Σ_{s≤t} (φ(q_t)·φ(k_s)) v_s) over the concatenated heads, then a projection.
    The derivative of p = s/Σs grows as 1/|s| without a bound; that of the norm is bounded by 1/eps.

    Args:
        hidden_size: Width D of the input and the output.
        num_heads: H.
        variant: "t1": φ = elu; "t2": φ = 1 + elu.
        lrpe: Whether q and k are mapped by their position, with trained angles.

    Example:
        >>> layer = NormAttention(32, 4)
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
    """

    def __init__(
        self, hidden_size: int, num_heads: int, variant: Variant = "t1", lrpe: bool = True
    ) -> None:
        super().__init__(hidden_size, num_heads, variant, lrpe, gain=1 / math.sqrt(2))
        self.layer_norm = SRMSNorm()

    def _inputs(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._project(x)
        q, k = F.elu(q), F.elu(k)
        if self.variant == "t2":
            q, k = q + 1, k + 1
        return self._position(q, positions), self._position(k, positions), v

    def _output(self, o: Tensor) -> Tensor:
        y: Tensor = self.out_proj(self.layer_norm(o.flatten(-2)))
        return y

    def forward(
        self,
        x: Tensor,
        initial_state: PositionedState | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, PositionedState | None]:
        """Mix x `[B, T, D]`; the state is the memory `[B, H, D/H, D/H]` and the next position."""
        memory, start = (None, None) if initial_state is None else initial_state
        batch, length = x.shape[:2]
        q, k, v = self._inputs(x, token_positions(batch, length, cu_seqlens, start))
        o, final = linear_attention(
            q,
            k,
            v,
            scale=1.0,
            initial_state=memory,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
        memory = single_tensor(final)
        if memory is None:
            return self._output(o), None
        position = final_positions(batch, length, cu_seqlens, start).to(x.device)
        return self._output(o), PositionedState(memory, position)

    def step(self, x: Tensor, state: PositionedState) -> Tensor:
        """Mix one token per sequence, x `[B, D]`, and update the state in place."""
        q, k, v = self._inputs(x, state.position)
        o = linear_attention_step(q, k, v, state=state.memory, scale=1.0)
        state.position.add_(1)
        return self._output(o)

    def init_state(self, batch: int) -> PositionedState:
        """The state of `batch` sequences before their first token."""
        memory = self._zeros(batch, self.num_heads, self.head_k_dim, self.head_v_dim)
        return PositionedState(memory, self._start(batch))


class DiagAttention(_TransNormerAttention):
    """Causal attention inside blocks that do not overlap in O(T·block_size) time and memory.

    Token t sees the tokens of its own block up to itself and nothing of the block before, so this
    is not a sliding window. Blocks count from the start of each sequence.

    Args:
        hidden_size: Width D of the input and the output.
        num_heads: H.
        variant: "t1": weights relu(q·k / √K), output through SRMSNorm; "t2": softmax.
        block_size: Tokens per block; 64 is the paper's for language models.
        lrpe: Whether q and k are mapped by their position, with trained angles.

    Raises:
        ValueError: `block_size < 1`.

    Example:
        >>> layer = DiagAttention(32, 4, block_size=8)
        >>> y, state = layer(torch.randn(2, 10, 32), output_final_state=True)
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        variant: Variant = "t1",
        block_size: int = 64,
        lrpe: bool = True,
    ) -> None:
        super().__init__(hidden_size, num_heads, variant, lrpe, gain=1.0)
        if block_size < 1:
            raise ValueError(f"DiagAttention: expected block_size >= 1, got {block_size}")
        self.block_size = block_size
        self.gated_rms_norm = SRMSNorm()

    def _inputs(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._project(x)
        q = q * self.head_k_dim**-0.5
        return self._position(q, positions), self._position(k, positions), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Attend from q `[N, Q, H, K]` to k, v `[N, w, H, ·]` where visible `[N or 1, 1, Q, w]`."""
        logits = torch.einsum("nihk,njhk->nhij", q, k)
        if self.variant == "t1":
            weights = logits.relu() * visible
        else:
            weights = logits.masked_fill(~visible, -math.inf).softmax(dim=-1)
        return torch.einsum("nhij,njhv->nihv", weights, v)

    def _output(self, o: Tensor) -> Tensor:
        o = o.flatten(-2)
        y: Tensor = self.out_proj(self.gated_rms_norm(o) if self.variant == "t1" else o)
        return y

    def forward(
        self,
        x: Tensor,
        initial_state: BlockState | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, BlockState | None]:
        """Mix x `[B, T, D]`; the state holds the current block's keys and values."""
        batch, length = x.shape[:2]
        check_cu_seqlens("DiagAttention", batch, length, cu_seqlens)
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        state = self.init_state(sequences) if initial_state is None else initial_state
        if state.position.shape != (sequences,):
            raise ValueError(
                f"DiagAttention: expected initial_state of {sequences} sequences, "
                f"got {tuple(state.position.shape)} positions"
            )
        w = self.block_size
        q, k, v = self._inputs(x, token_positions(batch, length, cu_seqlens, state.position))

        # Every sequence owns a run of blocks; its first one begins with the state's tokens.
        filled = state.position % w
        end = final_positions(batch, length, cu_seqlens, filled).to(x.device)
        owned = ((end - 1) // w + 1).clamp(min=1)
        first = owned.cumsum(0) - owned
        blocks = (
            sequences * max((length - 1 + (w - 1 if initial_state else 0)) // w + 1, 1)
            if cu_seqlens is None
            else length // w + 2 * sequences
        )
        sequence = token_sequences(batch, length, cu_seqlens).to(x.device)
        slot = first[sequence] * w + token_positions(batch, length, cu_seqlens, filled)
        slot = slot.flatten()
        head = (first[:, None] * w + torch.arange(w, device=x.device)).flatten()

        def in_blocks(tokens: Tensor, kept: Tensor | None = None) -> Tensor:
            laid_out: Tensor = tokens.new_zeros(blocks * w, *tokens.shape[2:])
            if kept is not None:
                laid_out = laid_out.index_copy(0, head, kept.flatten(0, 1).to(tokens.dtype))
            laid_out = laid_out.index_copy(0, slot, tokens.flatten(0, 1))
            return laid_out.view(blocks, w, *tokens.shape[2:])

        k_blocks, v_blocks = in_blocks(k, state.k), in_blocks(v, state.v)
        causal = torch.ones(w, w, dtype=torch.bool, device=x.device).tril()[None, None]
        o = self._attend(in_blocks(q), k_blocks, v_blocks, causal)
        y = self._output(o.flatten(0, 1)[slot].unflatten(0, (batch, length)))
        if not output_final_state:
            return y, None
        last = first + owned - 1
        position = final_positions(batch, length, cu_seqlens, state.position).to(x.device)
        return y, BlockState(k_blocks[last], v_blocks[last], position)

    def step(self, x: Tensor, state: BlockState) -> Tensor:
        """Mix one token per sequence, x `[B, D]`, in O(block_size); updates the state in place."""
        q, k, v = self._inputs(x, state.position)
        slot = state.position % self.block_size
        row = torch.arange(len(slot), device=slot.device)
        state.k[row, slot] = k.to(state.k.dtype)
        state.v[row, slot] = v.to(state.v.dtype)
        visible = torch.arange(self.block_size, device=slot.device) <= slot[:, None]
        k, v = state.k.to(q.dtype), state.v.to(q.dtype)
        o = self._attend(q[:, None], k, v, visible[:, None, None])
        state.position.add_(1)
        return self._output(o.squeeze(1))

    def init_state(self, batch: int) -> BlockState:
        """The state of `batch` sequences before their first token."""
        weight = self.q_proj.weight
        k = weight.new_zeros(batch, self.block_size, self.num_heads, self.head_k_dim)
        return BlockState(k, torch.zeros_like(k), self._start(batch))


class GLU(nn.Module):
    """W₃(silu(W₁x + b₁) ⊙ (W₂x + b₂)) + b₃, the feed-forward part of a TransNormer block.

    Args:
        hidden_size: Width of the input and the output.
        inner_size: Width between; default ⌊8/3·hidden_size⌋.
    """

    def __init__(self, hidden_size: int, inner_size: int | None = None) -> None:
        super().__init__()
        inner_size = int(8 / 3 * hidden_size) if inner_size is None else inner_size
        self.l1 = nn.Linear(hidden_size, inner_size)
        self.l2 = nn.Linear(hidden_size, inner_size)
        self.l3 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., D]`."""
        y: Tensor = self.l3(F.silu(self.l1(x)) * self.l2(x))
        return y


class TransNormerBlock(nn.Module):
    """x ← x + Attention(SRMSNorm(x)); x ← x + GLU(SRMSNorm(x)).

    The first half of a model's layers attend inside blocks (`DiagAttention`), the second half
    over everything (`NormAttention`): the first keeps local detail that linear attention dilutes.

    Args:
        hidden_size: Width D.
        num_heads: H.
        layer_idx: Number of this layer, from 0.
        num_layers: Number of layers of the model.
        variant: "t1" (relu blocks, elu) or "t2" (softmax blocks, 1 + elu).
        block_size: Tokens per block of `DiagAttention`.
        inner_size: Inner width of the GLU; default ⌊8/3·D⌋.
        lrpe: Whether q and k are mapped by their position.

    Example:
        >>> blocks = [TransNormerBlock(32, 4, layer_idx=i, num_layers=2) for i in range(2)]
        >>> y, state = blocks[0](torch.randn(2, 10, 32), output_final_state=True)
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        layer_idx: int,
        num_layers: int,
        variant: Variant = "t1",
        block_size: int = 64,
        inner_size: int | None = None,
        lrpe: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= layer_idx < num_layers:
            raise ValueError(
                f"TransNormerBlock: expected 0 <= layer_idx < num_layers = {num_layers}, "
                f"got {layer_idx}"
            )
        self.self_attn_layer_norm = SRMSNorm()
        self.self_attn: DiagAttention | NormAttention = (
            DiagAttention(hidden_size, num_heads, variant, block_size, lrpe)
            if layer_idx < num_layers // 2
            else NormAttention(hidden_size, num_heads, variant, lrpe)
        )
        self.final_layer_norm = SRMSNorm()
        self.glu = GLU(hidden_size, inner_size)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.glu(self.final_layer_norm(x))
        return y

    def forward(
        self,
        x: Tensor,
        initial_state: PositionedState | BlockState | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, PositionedState | BlockState | None]:
        """Map x `[B, T, D]`; the state is that of the attention."""
        mixed, state = self.self_attn(
            self.self_attn_layer_norm(x), initial_state, output_final_state, cu_seqlens
        )
        return self._feed_forward(x + mixed), state

    def step(self, x: Tensor, state: PositionedState | BlockState) -> Tensor:
        """Map one token per sequence, x `[B, D]`, and update the state in place."""
        mixed: Tensor = self.self_attn.step(self.self_attn_layer_norm(x), state)  # type: ignore[arg-type]
        return self._feed_forward(x + mixed)

    def init_state(self, batch: int) -> PositionedState | BlockState:
        """The state of `batch` sequences before their first token."""
        return self.self_attn.init_state(batch)
