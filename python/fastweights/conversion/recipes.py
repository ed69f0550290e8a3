"""The recipes: which attention takes the place of softmax, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastweights.ops.attention.state import Layout


@dataclass(frozen=True)
class Recipe:
    """How one attention layer is made linear.

    Attributes:
        name: of the recipe it came from.
        window: latest tokens that keep exact softmax attention; 0 leaves out the window.
        layout: "sliding" or "terraced", see `fastweights.hybrid_attention`.
        feature_dim: columns F/2 of the Hedgehog matrices; a head has twice as many features.
        rotated: features of q and k after (True) or before the rotary embedding.
        shared: key features (and decays) for every key head; False gives every query head its own.
        gain: a trained size of every token's features, exp(a · x + b), for queries and for keys.
        decay: a trained decay for every head of the state and feature.
        sink: a trained score, linear in the unrotated q, of one more key whose value is zero.
    """

    name: str = "stable"
    window: int = 64
    layout: Layout = "sliding"
    feature_dim: int = 64
    rotated: bool = False
    shared: bool = True
    gain: bool = False
    decay: bool = True
    sink: bool = True

    def __post_init__(self) -> None:
        if self.window < 0 or (self.window == 0 and (self.decay or self.sink)):
            raise ValueError(
                f"linearize: expected window >= 1 for recipe {self.name!r}, got {self.window}"
            )
        if self.feature_dim < 1:
            raise ValueError(f"linearize: expected feature_dim >= 1, got {self.feature_dim}")
        if self.layout not in ("sliding", "terraced"):
            raise ValueError(
                f"linearize: expected layout 'sliding' or 'terraced', got {self.layout!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a config file."""
        return asdict(self)


_PUBLISHED: dict[str, Any] = {
    "rotated": True,
    "shared": False,
    "gain": False,
    "decay": False,
    "sink": False,
}

RECIPES = {
    # A function of the distance alone and forgetful: does not drift beyond the training length.
    "stable": Recipe(),
    # LoLCATs (2024) as published.
    "lolcats": Recipe("lolcats", **_PUBLISHED),
    # Hedgehog (2024) as published: linear attention over everything, the token itself included.
    "hedgehog": Recipe("hedgehog", window=0, **_PUBLISHED),
}


def recipe_named(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(
            f"linearize: expected recipe {', '.join(map(repr, RECIPES))}, got {name!r}"
        )
    return RECIPES[name]
