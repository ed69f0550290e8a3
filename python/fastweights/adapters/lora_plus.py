"""LoRA+: a larger learning rate for B than for A."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastweights.adapters.lora_embedding import LoRAEmbedding

__all__ = ["lora_plus_groups"]


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    *,
    embedding_lr: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups in which B learns `ratio` times as fast as A (LoRA+, arXiv:2402.12354).

    B starts at zero and A does not, so that in wide layers one rate is too small for B or too large
    for A; the paper finds ratios about 16 good.

    Args:
        model: with adapters; only what requires gradients is grouped.
        lr: of A and of whole modules.
        ratio: of the rate of B, and of vectors such as biases, to `lr`.
        embedding_lr: of A and B of embeddings.
        weight_decay: of all but biases and norms.

    Returns:
        Groups for any optimizer of torch, those with parameters only.

    Raises:
        ValueError: a rate or ratio that is not positive, or nothing to train.

    Example:
        >>> import torch, fastweights as fw
        >>> from fastweights.adapters import LoRA, lora_plus_groups
        >>> model = fw.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoRA(rank=2))
        >>> optimizer = torch.optim.AdamW(lora_plus_groups(model, 1e-4))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.0001, 0.0016]
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("embedding_lr", embedding_lr)):
        if value <= 0:
            raise ValueError(f"lora_plus_groups: expected {name} > 0, got {value}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in model.modules():
        embedding = isinstance(module, LoRAEmbedding)
        plain = "norm" in type(module).__name__.lower()
        for path, parameter in _own(module):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            fast = path.startswith("lora_B") or parameter.dim() == 1
            rate = embedding_lr if embedding else lr * ratio if fast else lr
            decay = 0.0 if "bias" in path or plain else weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise ValueError("lora_plus_groups: expected a model with something to train, got none")
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module and of the dictionaries that it keeps adapters in."""
    found = list(module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if isinstance(child, nn.ParameterDict):
            found += [(f"{name}.{key}", p) for key, p in child.named_parameters()]
    return found
