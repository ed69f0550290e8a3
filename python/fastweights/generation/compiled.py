"""The fast decoder: a linearised and quantized model as one op per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastweights.conversion.attention import LinearizedAttention
from fastweights.generation.engine import ModuleEngine
from fastweights.generation.state import GenerationState
from fastweights.ops.attention.state import HybridState
from fastweights.ops.decoding.functional import decode_step
from fastweights.ops.quantization.layers import QuantizedLinear

# Largest difference of logits, relative to the largest of them, between the module path and the
# compiled one on the same token: rounding, and its effect on activations that are quantized to 8
# bits.
_TOLERANCE = 2e-2

_verdicts: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class NotCompilable(Exception):
    """Why a model cannot be decoded by the one op."""


class Program:
    """The arguments of `decode_step` that do not change from token to token, taken from a model.

    Args:
        model: a Hugging Face causal language model, linearised with a window and quantized.

    Raises:
        NotCompilable: something in the model is not what the op computes.
    """

    def __init__(self, model: Any) -> None:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        self.embedding: nn.Module = model.get_input_embeddings()
        head, rotary = model.get_output_embeddings(), _part(decoder, "rotary_emb")
        _require(
            isinstance(head, QuantizedLinear) and head.bias is None,
            "an output layer that is quantized",
        )
        _require(
            _rope_type(rotary) in ("default", "linear", "llama3", "yarn"),
            "fixed rotary frequencies",
        )
        layers = [_LayerParts(layer) for layer in _part(decoder, "layers")]
        first, linears = layers[0], [linear for layer in layers for linear in layer.linears]
        for name in ("format", "group_size", "activation"):
            _require(len({getattr(x, name) for x in linears}) == 1, f"one {name} for all layers")
        _require(
            linears[0].activation == head.activation, "the activation of the layers at the output"
        )
        _require(
            len({layer.attention.recipe for layer in layers}) == 1, "one recipe for all layers"
        )
        epsilons = {_epsilon(norm) for layer in layers for norm in layer.norm_modules}
        final_norm = _part(decoder, "norm")
        _require(epsilons == {_epsilon(final_norm)}, "one epsilon for all norms")

        _require(
            all(linear.order is None for linear in [*linears, head]), "inputs in their own order"
        )

        biased = any(linear.bias is not None for linear in linears)
        self.arguments: dict[str, Any] = {
            "weights": [linear.packed for linear in linears],
            "biases": [_or_empty(linear.bias) for linear in linears] if biased else [],
            "norms": [norm for layer in layers for norm in layer.norms],
            "maps": [map_ for layer in layers for map_ in layer.maps],
            "final_norm": _float(final_norm.weight),
            "head": head.packed,
            "inv_freq": _float(rotary.inv_freq),
            "intermediate": first.linears[4].out_features,
            "vocab": head.out_features,
            "rotated_features": first.attention.recipe.rotated,
            "rotary_factor": float(rotary.attention_scaling),
            "scale": float(first.attention.scaling),
            "norm_eps": epsilons.pop(),
            "format": linears[0].format,
            "group_size": linears[0].group_size,
            "head_format": head.format,
            "head_group_size": head.group_size,
            "activation": head.activation,
        }

    def step(self, tokens: Tensor, states: list[HybridState]) -> Tensor:
        """Token ids `[B]` to logits `[B, V]`; the states go one token on."""
        x = self.embedding(tokens).float()
        tensors = [tensor for state in states for tensor in state.tensors()]
        return decode_step(x, states=tensors, **self.arguments)


class _LayerParts:
    """The tensors of one decoder layer, in the order of the op's lists."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = _part(layer, "self_attn"), _part(layer, "mlp")
        _require(
            isinstance(attention, LinearizedAttention) and attention.mix is not None,
            "window attention throughout",
        )
        _require(attention.recipe.layout == "sliding", "a sliding window")
        self.attention: LinearizedAttention = attention
        names = (
            (attention, ("q_proj", "k_proj", "v_proj", "o_proj")),
            (mlp, ("gate_proj", "up_proj", "down_proj")),
        )
        found = [_part(owner, name) for owner, parts in names for name in parts]
        _require(
            all(isinstance(x, QuantizedLinear) for x in found), "quantized linear layers throughout"
        )
        self.linears: list[QuantizedLinear] = found
        norms = [_part(layer, "input_layernorm"), _part(layer, "post_attention_layernorm")]
        optional = [attention.q_norm, attention.k_norm]
        self.norm_modules = [*norms, *(norm for norm in optional if norm is not None)]
        self.norms = [
            _or_empty(None if norm is None else norm.weight) for norm in (*norms, *optional)
        ]
        decay = attention.decay()
        self.maps = [
            _float(attention.feature_q.weight),
            _float(attention.feature_k.weight),
            _float(attention.mix.sigmoid()),
            _or_empty(None if decay is None else decay.exp()),
            _affine(attention.sink_weight, attention.sink_bias),
            _affine(attention.feature_q.gain_weight, attention.feature_q.gain_bias),
            _affine(attention.feature_k.gain_weight, attention.feature_k.gain_bias),
        ]


class CompiledEngine(ModuleEngine):
    """Reads prompts as `ModuleEngine` does, then steps all rows with one op per token.

    Rows may have different lengths. The states of the rows are stacked once, after the prompts; a
    step changes them in place and allocates nothing but the logits.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        *,
        chunk: int,
        start: GenerationState | None = None,
    ) -> None:
        super().__init__(model, chunk=chunk, start=start)
        self._program = program
        self._layers: list[HybridState] = []
        self._tokens = torch.empty(0)

    def read(self, prompts: Sequence[Tensor]) -> Tensor:
        """See `Engine`."""
        logits = super().read(prompts)
        self._layers, self._tokens = super()._collect()
        self._groups = []
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See `Engine`."""
        self._logits = self._program.step(tokens, self._layers)
        self._tokens += 1
        return self._logits

    def _collect(self) -> tuple[list[Any], Tensor]:
        return self._layers, self._tokens


def engine_for(model: nn.Module, *, chunk: int, start: GenerationState | None) -> ModuleEngine:
    """The fastest engine that `model` allows."""
    try:
        program = Program(model)
    except NotCompilable:
        return ModuleEngine(model, chunk=chunk, start=start)
    if not _agrees(model, program):
        return ModuleEngine(model, chunk=chunk, start=start)
    return CompiledEngine(model, program, chunk=chunk, start=start)


def _agrees(model: nn.Module, program: Program) -> bool:
    """Whether the op computes what the model does, found out by trying it, once per model.

    The names of a model's parts do not say what they do.
    """
    if model not in _verdicts:
        with torch.inference_mode():
            engine = ModuleEngine(model, chunk=8)
            engine.read([torch.arange(4)])
            states = engine.state().layers
            token = torch.tensor([4])
            got, expected = program.step(token, states), engine.step(token)
            error = (got - expected).abs().max() / expected.abs().max()
            _verdicts[model] = bool(error <= _TOLERANCE)
    return _verdicts[model]


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise NotCompilable(f"expected {what}")


def _part(owner: Any, name: str) -> Any:
    part = getattr(owner, name, None)
    _require(part is not None, f"a part called {name}")
    return part


def _epsilon(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def _rope_type(rotary: Any) -> str:
    kinds = getattr(rotary, "rope_type", "default")
    return kinds if isinstance(kinds, str) else "per layer"


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _affine(weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Weight `[H, K]` and bias `[H]` side by side, so that y = (x, 1) · row."""
    if weight is None or bias is None:
        return torch.empty(0)
    return _float(torch.cat((weight, bias[:, None]), 1))


def _or_empty(tensor: Tensor | None) -> Tensor:
    return torch.empty(0) if tensor is None else _float(tensor)
