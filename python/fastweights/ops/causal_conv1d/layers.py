"""The short convolution as a module."""

from typing import Any

from torch import Tensor, nn

from fastweights.ops.causal_conv1d.functional import causal_conv1d, causal_conv1d_update
from fastweights.ops.causal_conv1d.reference import Activation

__all__ = ["ShortConvolution"]


class ShortConvolution(nn.Conv1d):
    """Each channel convolved with the latest tokens of its own: `fastweights.causal_conv1d`.

    State-dict keys, shapes and initialisation are those of fla and of `torch.nn.Conv1d`: `weight`
    `[D, 1, W]` and, if asked for, `bias` `[D]`.

    Args:
        hidden_size: Channels D.
        kernel_size: Width W, the token itself included.
        bias: Whether there is a bias.
        activation: None or "silu".
        **kwargs: `device` and `dtype` of the parameters.

    Example:
        >>> convolution = ShortConvolution(64, 4)
        >>> y, state = convolution(torch.randn(2, 10, 64), output_final_state=True)
        >>> state.shape
        torch.Size([2, 64, 3])
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: Activation = "silu",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            hidden_size,
            hidden_size,
            kernel_size,
            padding=kernel_size - 1,
            groups=hidden_size,
            bias=bias,
            **kwargs,
        )
        self.activation: Activation = activation

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve x `[B, T, D]`; the state is the latest W - 1 inputs, `[B, D, W - 1]`."""
        return causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            activation=self.activation,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """Convolve one token per sequence, x `[B, D]`, and update the state in place."""
        return causal_conv1d_update(
            x, self.weight.squeeze(1), self.bias, state=state, activation=self.activation
        )

    def init_state(self, batch: int) -> Tensor:
        """The state of `batch` sequences before their first token."""
        return self.weight.new_zeros(batch, self.in_channels, self.kernel_size[0] - 1)
