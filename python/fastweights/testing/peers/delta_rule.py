"""The delta rule as transformers computes it where no kernel package is installed, as on a CPU."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from fastweights.testing.opspec import Peer, Sample, sample

__all__ = ["GATED", "GATED_STEP", "KDA", "KDA_STEP"]


def _load(model: str, name: str) -> Callable[..., Any]:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    # Without its decorator, which would prefer an installed fla.
    function: Callable[..., Any] = inspect.unwrap(getattr(module, name))
    return function


def _adapt(call: Sample, gate_dims: int) -> Sample | None:
    """Our call as theirs, if its gate has `gate_dims` dimensions."""
    q, k, v = call.args
    g, beta = call.kwargs["g"], call.kwargs["beta"]
    if g is None or g.dim() != gate_dims:
        return None
    return sample(q, k, v, g, beta, use_qk_l2norm_in_kernel=call.kwargs["qk_l2norm"])


def _adapt_step(call: Sample, gate_dims: int) -> Sample | None:
    """A step is a sequence of one token; the state comes back instead of changing in place."""
    state = call.kwargs["state"]
    timed = Sample(call.args, {k: v for k, v in call.kwargs.items() if k != "state"})
    adapted = _adapt(timed.map_tensors(lambda t: t.unsqueeze(1)), gate_dims)
    if adapted is None:
        return None
    adapted.kwargs.update(initial_state=state.clone(), output_final_state=True)
    return adapted


GATED = Peer(
    "transformers Qwen3-Next",
    load=lambda: _load("qwen3_next", "torch_chunk_gated_delta_rule"),
    adapt=lambda call: _adapt(call, gate_dims=3),
    matmul=True,
)
KDA = Peer(
    "transformers Kimi-Linear",
    load=lambda: _load("kimi_linear", "chunk_kimi_delta_attention"),
    adapt=lambda call: _adapt(call, gate_dims=4),
)
GATED_STEP = Peer(
    "transformers Qwen3-Next",
    load=lambda: _load("qwen3_next", "torch_recurrent_gated_delta_rule"),
    adapt=lambda call: _adapt_step(call, gate_dims=3),
    backward=False,
)
KDA_STEP = Peer(
    "transformers Kimi-Linear",
    load=lambda: _load("kimi_linear", "recurrent_kimi_delta_attention"),
    adapt=lambda call: _adapt_step(call, gate_dims=4),
    backward=False,
)
