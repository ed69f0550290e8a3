"""Feature maps of linear attention: φ with φ(q)·φ(k) in the place of exp(q·k).

Every map acts on the last dimension of `[..., head_dim]`, and a map with its own weights per head
on the last two of `[..., H, head_dim]`. Parameter names are those of fla where fla has the map.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "FEATURE_MAPS",
    "DPFPFeatureMap",
    "EluFeatureMap",
    "HadamardFeatureMap",
    "HedgehogFeatureMap",
    "T2RFeatureMap",
    "TaylorFeatureMap",
    "feature_map",
]

HedgehogNorm = Literal["joint", "separate", "exp"]


class EluFeatureMap(nn.Module):
    """φ(x) = elu(x) + 1, the positive map of Transformers are RNNs (arXiv:2006.16236, eq. 7)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., D]`."""
        return F.elu(x) + 1


class T2RFeatureMap(nn.Module):
    """φ(x) = relu(Wx + b) with a trained W (T2R, arXiv:2103.13076).

    Args:
        head_dim: Width D of the input.
        dot_dim: Width of the features; default `head_dim`.
        bias: Whether b exists. The paper has it; the default, as in fla, has not.
    """

    def __init__(self, head_dim: int, dot_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim if dot_dim is None else dot_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., dot_dim]`."""
        projected: Tensor = self.layer(x)
        return projected.relu()


class HadamardFeatureMap(nn.Module):
    """φ(x) = (W₁x + b₁) ⊙ (W₂x + b₂), signed: the map that fla calls `elementwise_product`."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(head_dim, head_dim)
        self.layer2 = nn.Linear(head_dim, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., D]`."""
        product: Tensor = self.layer1(x) * self.layer2(x)
        return product


class DPFPFeatureMap(nn.Module):
    """Products of r = [relu(x), relu(-x)] with r rolled by 1…ν (DPFP, arXiv:2102.11174).

    Args:
        head_dim: Width D of the input; the features have 2·D·nu entries.
        nu: Number of shifts.
    """

    def __init__(self, head_dim: int, nu: int = 4) -> None:
        super().__init__()
        if not 1 <= nu < 2 * head_dim:
            raise ValueError(f"DPFPFeatureMap: expected 1 <= nu < {2 * head_dim}, got {nu}")
        self.nu = nu

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., 2·D·nu]`."""
        r = torch.cat([x.relu(), (-x).relu()], dim=-1)
        return torch.cat([r * r.roll(shift, dims=-1) for shift in range(1, self.nu + 1)], dim=-1)


class TaylorFeatureMap(nn.Module):
    """φ(q)·φ(k) = 1 + s + s²/2 with s = q·k / √D: exp(s) to second order (Based, arXiv:2402.18668).

    The symmetric half of x⊗x is stored once: 1 + D + D(D+1)/2 features, 153 of them for D = 16.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., 1 + D + D(D+1)/2]`: constant, linear, squares, products."""
        root = math.sqrt(self.head_dim)
        i, j = torch.triu_indices(self.head_dim, self.head_dim, offset=1, device=x.device)
        one = torch.ones_like(x[..., :1])
        squares = x.square() / (root * math.sqrt(2))
        products = x[..., i] * x[..., j] / root
        return torch.cat([one, x / math.sqrt(root), squares, products], dim=-1)


class HedgehogFeatureMap(nn.Module):
    """A trained positive map that learns to be spiky and monotone as softmax is (arXiv:2402.04347).

    With y = scale·(Wx + b) and e = [y, -y], the features are
      joint     softmax(e): the whole sums to 1;
      separate  [softmax(y), softmax(-y)]: each half sums to 1;
      exp       [exp(y - max y), exp(min y - y)]: the largest of each half is 1.

    `HedgehogFeatureMap(d)` is fla's map: one W with bias for all heads, joint, scale 2, starting
    from the identity. `HedgehogFeatureMap(d, num_heads=h, norm="separate")` is the map of the
    LoLCATs code: a `[h, d, f]` weight per head, no bias, Kaiming-uniform.

    Args:
        head_dim: Width D of the input.
        feature_dim: Width f of y; the features have 2f entries. Default `head_dim`.
        num_heads: None shares W between the heads; a number gives each head its own and expects
            `[..., num_heads, D]`.
        norm: How e becomes positive (see above).
        scale: Factor of y; default 2 for `joint`, else 1.
        bias: Whether b exists; default: only when W is shared.
        init: `identity` (f = D only) or `kaiming`; default `identity` when W is shared.
        eps: Lower bound of `separate` and `exp` features, so that a row's sum is never 0.
    """

    def __init__(
        self,
        head_dim: int,
        feature_dim: int | None = None,
        *,
        num_heads: int | None = None,
        norm: HedgehogNorm = "joint",
        scale: float | None = None,
        bias: bool | None = None,
        init: Literal["identity", "kaiming"] | None = None,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        feature_dim = head_dim if feature_dim is None else feature_dim
        shared = num_heads is None
        init = init or ("identity" if shared and feature_dim == head_dim else "kaiming")
        if norm not in ("joint", "separate", "exp"):
            raise ValueError(
                f'HedgehogFeatureMap: expected norm "joint", "separate" or "exp", got {norm!r}'
            )
        if init == "identity" and feature_dim != head_dim:
            raise ValueError(
                f"HedgehogFeatureMap: expected feature_dim = head_dim = {head_dim} for the "
                f"identity init, got {feature_dim}"
            )
        if bias and not shared:
            raise ValueError("HedgehogFeatureMap: expected bias=False with num_heads, got True")
        self.norm = norm
        self.scale = scale if scale is not None else (2.0 if norm == "joint" else 1.0)
        self.eps = eps
        self.layer: nn.Linear | nn.Parameter
        if num_heads is None:
            self.layer = nn.Linear(head_dim, feature_dim, bias=bias is not False)
        else:
            self.layer = nn.Parameter(torch.empty(num_heads, head_dim, feature_dim))
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights again."""
        weight = self.layer.weight if isinstance(self.layer, nn.Linear) else self.layer
        with torch.no_grad():
            if self.init == "identity":
                weight.copy_(torch.eye(weight.shape[-1]).expand_as(weight))
            else:
                nn.init.kaiming_uniform_(weight)
            if isinstance(self.layer, nn.Linear) and self.layer.bias is not None:
                self.layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` (`[..., H, D]` with `num_heads`) to `[..., 2f]`, computed in float32."""
        if isinstance(self.layer, nn.Linear):
            y = self.layer(x)
        else:
            y = torch.einsum("...hd,hdf->...hf", x, self.layer)
        y = self.scale * (y if y.dtype == torch.float64 else y.float())
        if self.norm == "joint":
            features = torch.cat([y, -y], dim=-1).softmax(dim=-1)
        elif self.norm == "separate":
            features = torch.cat([y.softmax(dim=-1), (-y).softmax(dim=-1)], dim=-1)
        else:
            largest, smallest = y.amax(dim=-1, keepdim=True), y.amin(dim=-1, keepdim=True)
            features = torch.cat([(y - largest).exp(), (smallest - y).exp()], dim=-1)
        if self.norm != "joint":
            features = features.clamp(min=self.eps)
        return features.to(x.dtype)


def _parameter_free(module: type[nn.Module]) -> Callable[[int], nn.Module]:
    return lambda head_dim: module()


FEATURE_MAPS: dict[str, Callable[[int], nn.Module]] = {
    "elu": _parameter_free(EluFeatureMap),
    "relu": _parameter_free(nn.ReLU),
    "identity": _parameter_free(nn.Identity),
    "hedgehog": HedgehogFeatureMap,
    "t2r": T2RFeatureMap,
    "taylor": TaylorFeatureMap,
    "elementwise_product": HadamardFeatureMap,
    "dpfp": DPFPFeatureMap,
}


def feature_map(name: str | Callable[[int], nn.Module], head_dim: int) -> nn.Module:
    """Build a feature map.

    Args:
        name: A key of `FEATURE_MAPS`, or a factory that takes `head_dim`, for example
            `functools.partial(HedgehogFeatureMap, num_heads=8, norm="separate")`.
        head_dim: Width of the queries and keys of one head.

    Raises:
        ValueError: The name is unknown.
    """
    if callable(name):
        return name(head_dim)
    if name not in FEATURE_MAPS:
        raise ValueError(f"feature_map: expected one of {', '.join(FEATURE_MAPS)}, got {name!r}")
    return FEATURE_MAPS[name](head_dim)
