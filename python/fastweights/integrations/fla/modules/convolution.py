"""`fla.modules.convolution`: the short convolution, on `fastweights.causal_conv1d`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastweights.integrations.fla.ops import _arguments
from fastweights.ops.causal_conv1d import functional as ours
from fastweights.ops.causal_conv1d.reference import Activation

__all__ = [
    "ShortConvolution",
    "causal_conv1d",
    "causal_conv1d_update",
    "causal_conv1d_update_states",
]


def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: Activation = None,
    backend: str | None = "triton",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`causal_conv1d` of fla by `fastweights.causal_conv1d`.

    Args:
        x: [B, T, D], or [B, T, ...] of D channels together.
        weight: taps [D, W], the current token's last.
        bias: [D].
        residual: of x's shape, added after the activation.
        initial_state: the latest W inputs before the first token, [N, D, W].
        output_final_state: also return the latest W inputs after the last token, else None.
        activation: None, "silu" or "swish".
        backend: "triton", "cuda" or "mix": all are this one.
        cu_seqlens: [N + 1], B = 1.
        cu_seqlens_cpu: ignored.
        chunk_indices: ignored.
        cp_context: only None.
        **kwargs: ignored, as by fla.

    Returns:
        y of x's shape and dtype, and the final state [N, D, W] in x's dtype or None.

    Raises:
        ValueError: no weight, another backend or activation.
        NotImplementedError: `cp_context`.
    """
    _arguments.refuse_context_parallel(cp_context)
    if backend not in ("triton", "cuda", "mix"):
        raise ValueError(f"Unsupported backend: {backend}")
    weight = _given(weight)
    channels, width = weight.shape
    rows = x if x.shape[-1] == channels else x.flatten(2)
    if initial_state is None and output_final_state:
        sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = x.new_zeros(sequences, channels, width)
    y, state = ours.causal_conv1d(
        rows,
        weight,
        bias,
        activation=activation,
        residual=None if residual is None else residual.reshape(rows.shape),
        initial_state=initial_state,
        output_final_state=bool(output_final_state),
        cu_seqlens=cu_seqlens,
    )
    return y.contiguous().view(x.shape), state


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_update` of fla: one token of every sequence; `cache` moves on in place.

    Args:
        x: [N, D], [N, 1, D] or, packed, [1, N, D].
        cache: the latest W inputs [N, D, W] in x's dtype.
        residual: of x's shape, added after the activation.
        weight: taps [D, W].
        bias: [D].
        activation: None, "silu" or "swish".

    Returns:
        y of x's shape, and `cache` itself.

    Raises:
        ValueError: no weight, another activation.
        NotImplementedError: an argument that requires a gradient: there is none.
    """
    weight = _given(weight)
    rows = (-1, weight.shape[0])
    y = ours.causal_conv1d_update(
        x.reshape(rows),
        weight,
        bias,
        state=cache,
        activation=activation,
        residual=None if residual is None else residual.reshape(rows),
    )
    return y.view(x.shape), cache


def causal_conv1d_update_states(
    x: Tensor,
    state_len: int,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update_states` of fla: the latest inputs of every sequence.

    Args:
        x: [B, T, D], or [T, D] with `cu_seqlens`.
        state_len: W.
        initial_state: the latest W inputs before the first token, [N, D, W]; zeros by default.
        cu_seqlens: [N + 1], B = 1.

    Returns:
        [N, D, W], the last input last, in x's dtype.
    """
    if cu_seqlens is None:
        inputs = list(x)
    else:
        inputs = list(x.flatten(0, -2).split(cu_seqlens.diff().tolist()))
    if initial_state is None:
        initial_state = x.new_zeros(len(inputs), x.shape[-1], state_len)
    return torch.stack(
        [
            torch.cat([before, seen[-state_len:].T], dim=-1)[:, -state_len:]
            for before, seen in zip(initial_state.to(x.dtype), inputs, strict=True)
        ]
    )


class ShortConvolution(nn.Conv1d):
    """`ShortConvolution` of fla: constructor, state-dict keys and calls are its.

    Args:
        hidden_size: channels D.
        kernel_size: width W, the token itself included.
        bias: whether there is one.
        activation: None, "silu" or "swish".
        backend: "triton" or "cuda": both are `causal_conv1d`.
        device: of the parameters.
        dtype: of the parameters.
        **kwargs: `use_fast_conv1d` is deprecated and warns.

    Raises:
        ValueError: another backend.
        AssertionError: another activation.

    Example:
        >>> convolution = ShortConvolution(64, 4)
        >>> y, cache = convolution(torch.randn(2, 10, 64), output_final_state=True)
        >>> cache.shape
        torch.Size([2, 64, 4])
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: Activation = "silu",
        backend: str | None = "triton",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_channels=hidden_size,
            out_channels=hidden_size,
            kernel_size=kernel_size,
            padding=kernel_size - 1,
            groups=hidden_size,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        _arguments.expect(
            activation in (None, "silu", "swish"), f"Activation `{activation}` not supported yet."
        )
        if "use_fast_conv1d" in kwargs:
            warnings.warn(
                "The `use_fast_conv1d` parameter is deprecated and will be ignored. "
                "Please use the `backend` parameter instead.",
                stacklevel=2,
            )
        if backend not in ("cuda", "triton"):
            raise ValueError(f"Invalid backend: {backend}, must be one of ['cuda', 'triton']")
        self.hidden_size = hidden_size
        self.activation: Activation = activation
        self.backend = backend

    @property
    def state_size(self) -> int:
        """Numbers in a cache, for one sequence."""
        return self.hidden_size * self.kernel_size[0]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve x [B, T, D] after what `cache` [N, D, W] remembers.

        Without gradients and with one token per sequence it is `step`, which moves `cache` on in
        place. A `mask` [B, T] multiplies x in place, as in fla.

        Returns:
            y of x's shape, and the new cache or None.

        Raises:
            ValueError: `mask` together with `cu_seqlens`.
        """
        sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("`mask` and `cu_seqlens` cannot be provided at the same time")
            x = x.mul_(mask.unsqueeze(-1))
        if (
            not torch.is_grad_enabled()
            and x.shape[0] * x.shape[1] == sequences
            and (cu_seqlens is None or bool((cu_seqlens.diff() == 1).all()))
        ):
            return self.step(x, residual, cache, output_final_state, cu_seqlens)
        return causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            residual,
            cache,
            output_final_state,
            self.activation,
            cu_seqlens=cu_seqlens,
        )

    def step(
        self,
        x: Tensor,
        residual: Tensor | None,
        cache: Tensor | None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One token of every sequence; `cache` moves on in place, None counts as zeros."""
        if cache is None:
            sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            cache = x.new_zeros(sequences, self.hidden_size, self.kernel_size[0])
        y, cache = causal_conv1d_update(
            x, cache, residual, self.weight.squeeze(1), self.bias, self.activation
        )
        return y, cache if output_final_state else None


def _given(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError("`weight` must be a tensor of shape [D, W], got None.")
    return weight
