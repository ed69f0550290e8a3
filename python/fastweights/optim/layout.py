"""State dicts in the layout of bitsandbytes.

A parameter's state is `step` (int), `state1` and `state2` (float32 or uint8 codes of the
parameter's shape) and, with codes, `absmax1`, `absmax2` (one float32 per block) and `qmap1`,
`qmap2`, the 256 levels of the maps. Rules with one state have the keys with 1. bitsandbytes
writes all but `step` into a nested dict, so that FSDP leaves them alone, and reads both forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastweights.ops.optim.reference import dynamic_map

__all__ = ["maps_of", "with_maps", "without_maps"]

_NESTED = "__bnb_optimizer_quant_state__"
_STATES = ("1", "2")


def maps_of(signs: tuple[bool, ...]) -> dict[str, Tensor]:
    """The levels of each state's map, by its number."""
    return {i: dynamic_map(signed) for i, signed in zip(_STATES, signs, strict=False)}


def with_maps(state: dict[str, Any], maps: dict[str, Tensor]) -> dict[str, Any]:
    """A parameter's state with the maps of its codes."""
    return state | {f"qmap{i}": levels for i, levels in maps.items() if f"absmax{i}" in state}


def without_maps(
    state: dict[str, Any], maps: dict[str, Tensor], p: Tensor, block_size: int
) -> dict[str, Any]:
    """A copy of what `with_maps` or bitsandbytes made, checked and without the maps.

    Raises:
        ValueError: other keys, maps, shapes or blocks.
    """
    flat = {k: v for k, v in state.items() if k != _NESTED} | state.get(_NESTED, {})
    coded = any(key.startswith("absmax") for key in flat)
    names = ("state", "absmax", "qmap") if coded else ("state",)
    expected = {"step"} | {name + i for name in names for i in maps}
    if set(flat) != expected:
        raise ValueError(
            f"load_state_dict: expected a state with {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(flat))}"
        )
    loaded: dict[str, Any] = {"step": int(flat["step"])}
    blocks = -(-p.numel() // block_size)
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    for i, levels in maps.items():
        codes = flat[f"state{i}"]
        if codes.shape != p.shape or (codes.dtype == torch.uint8) != coded:
            kind = "uint8 codes" if coded else "numbers"
            raise ValueError(
                f"load_state_dict: expected state{i} of {kind} of shape {list(p.shape)} (from the "
                f"parameter), got {codes.dtype} of shape {list(codes.shape)}"
            )
        loaded[f"state{i}"] = codes.to(p.device, codes.dtype if coded else wide, copy=True)
        if not coded:
            continue
        absmax, theirs = flat[f"absmax{i}"], flat[f"qmap{i}"].float().cpu()
        if theirs.shape != levels.shape or not torch.allclose(theirs, levels, rtol=1e-5, atol=0.0):
            raise ValueError(f"load_state_dict: expected qmap{i} to be the dynamic map")
        if absmax.numel() != blocks:
            raise ValueError(
                f"load_state_dict: expected {blocks} numbers in absmax{i}, one per block of "
                f"block_size = {block_size}, got {absmax.numel()}"
            )
        loaded[f"absmax{i}"] = absmax.to(p.device, torch.float32, copy=True)
    return loaded
