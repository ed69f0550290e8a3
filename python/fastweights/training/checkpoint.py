"""A training's parameters, optimizer states and progress in one safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Of torch's optimizers, and of ours.
_STATES = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")


def store(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    losses: list[float],
    held_out: dict[int, float],
    steps: int,
) -> None:
    """Writes beside `path` and renames, so that an interruption leaves the earlier file whole."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in parameters.items():
        tensors[name] = parameter.detach().contiguous()
        for key in _STATES:
            if key in optimizer.state.get(parameter, ()):
                tensors[f"{key}/{name}"] = optimizer.state[parameter][key].contiguous()
    progress = json.dumps(
        {"settings": settings, "losses": losses, "held_out": list(held_out.items()), "steps": steps}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save_file(tensors, temporary, {"fastweights.training": progress})
    os.replace(temporary, path)


@torch.no_grad()
def restore(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    steps: int | None,
    free: set[str],
) -> tuple[list[float], dict[int, float], int]:
    """Puts back what `store` wrote; returns both kinds of losses and the steps of the schedule.

    Settings named in `free` are taken from the file into `settings`.

    Raises:
        ValueError: the file is damaged or belongs to a training with other settings.
    """
    from safetensors import SafetensorError, safe_open

    name = settings["name"]
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads((file.metadata() or {})["fastweights.training"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        losses, found_steps, found = progress["losses"], progress["steps"], progress["settings"]
        held_out = {int(step): float(loss) for step, loss in progress.get("held_out", ())}
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"{name}: {path} is not a checkpoint of a training, or is damaged ({error})"
        ) from error
    settings.update({key: found[key] for key in free & found.keys()})
    wanted = {**settings, "steps": found_steps if steps is None else steps}
    got = {**found, "steps": found_steps}
    if got != wanted:
        differing = [key for key in wanted if got.get(key) != wanted[key]]
        shown = ", ".join(f"{key}={wanted[key]}" for key in differing)
        raise ValueError(
            f"{name}: expected a checkpoint with {shown}, {path} has "
            + ", ".join(f"{key}={got.get(key)}" for key in differing)
        )
    for key, parameter in parameters.items():
        if key not in tensors or tensors[key].shape != parameter.shape:
            raise ValueError(
                f"{name}: expected {key} of shape {list(parameter.shape)} in the checkpoint {path}"
            )
        parameter.copy_(tensors[key])
        state = {k: tensors[f"{k}/{key}"] for k in _STATES if f"{k}/{key}" in tensors}
        if state:
            steps_done = torch.tensor(float(len(losses)))
            moved = {k: tensor.to(parameter.device) for k, tensor in state.items()}
            optimizer.state[parameter] = {"step": steps_done, **moved}
    return losses, held_out, found_steps
