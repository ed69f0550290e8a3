"""The layers of the delta rule against fla's own, run on a CPU by fla's naive references.

Needs `flash-linear-attention` with an importable `triton`: `make test-peers`.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastweights.nn as fnn
from fastweights.testing import assert_close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fla.layers.delta_net
    import fla.layers.gated_deltanet
    import fla.layers.gated_deltaproduct
    import fla.layers.gdn2
    import fla.layers.kda
    from fla.models.utils import Cache
    from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gdn2.naive import naive_recurrent_gdn2
    from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda

WIDTH = 32
HEADS = {"hidden_size": WIDTH, "num_heads": 2, "head_dim": 8}
DELTA = {"hidden_size": WIDTH, "num_heads": 2}
# Float32 on both sides, recurrences of some 20 steps: a hundred times its roundoff.
TOLERANCE = 1e-5

FLA = {
    "DeltaNet": fla.layers.delta_net,
    "GatedDeltaNet": fla.layers.gated_deltanet,
    "GatedDeltaProduct": fla.layers.gated_deltaproduct,
    "KimiDeltaAttention": fla.layers.kda,
    "GatedDeltaNet2": fla.layers.gdn2,
}
LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("DeltaNet", DELTA),
    ("DeltaNet", DELTA | {"use_gate": True, "conv_bias": True, "use_beta": False}),
    ("DeltaNet", DELTA | {"qk_activation": "elu", "qk_norm": "sum", "expand_v": 2.0}),
    ("DeltaNet", DELTA | {"qk_activation": "relu", "allow_neg_eigval": True}),
    ("DeltaNet", DELTA | {"qk_activation": "identity", "use_short_conv": False}),
    ("GatedDeltaNet", HEADS),
    ("GatedDeltaNet", HEADS | {"num_v_heads": 4, "expand_v": 1, "conv_bias": True}),
    ("GatedDeltaNet", HEADS | {"output_gate_activation": "sigmoid", "allow_neg_eigval": True}),
    ("GatedDeltaNet", HEADS | {"use_gate": False, "use_short_conv": False}),
    ("GatedDeltaProduct", HEADS),
    ("GatedDeltaProduct", HEADS | {"num_householder": 3, "num_v_heads": 4, "conv_size": 3}),
    ("GatedDeltaProduct", HEADS | {"use_forget_gate": False, "use_output_gate": False}),
    ("GatedDeltaProduct", HEADS | {"allow_neg_eigval": False, "use_short_conv": False}),
    ("KimiDeltaAttention", HEADS),
    ("KimiDeltaAttention", HEADS | {"num_v_heads": 4, "expand_v": 2, "allow_neg_eigval": True}),
    ("KimiDeltaAttention", HEADS | {"safe_gate": True, "lower_bound": -5.0, "conv_bias": True}),
    ("KimiDeltaAttention", HEADS | {"use_short_conv": False}),
    ("GatedDeltaNet2", HEADS),
    ("GatedDeltaNet2", HEADS | {"num_v_heads": 4, "expand_v": 2, "allow_neg_eigval": True}),
    ("GatedDeltaNet2", HEADS | {"use_short_conv": False}),
]


# ---- fla's ops by fla's naive references ---------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def packed(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The op that runs `rule` on one packed sequence after another."""

    def op(
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        state_v_first: bool = False,
        **given: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if use_qk_l2norm_in_kernel:
            given |= {name: unit(given[name]) for name in ("q", "k")}
        if initial_state is not None and state_v_first:
            initial_state = initial_state.mT
        length = given["q"].shape[1]
        ends = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
        outputs, finals = [], []
        for n, (start, end) in enumerate(pairwise(ends)):
            part = dict(given)
            for name, x in given.items():
                if isinstance(x, Tensor) and x.dim() >= 3:
                    rows = x.shape[1] // length  # DeltaProduct has n of k, v and beta a token
                    part[name] = x[:, start * rows : end * rows]
            before = initial_state
            if initial_state is not None and cu_seqlens is not None:
                before = initial_state[n : n + 1]
            o, final = rule(initial_state=before, output_final_state=True, **part)
            outputs.append(o)
            finals.append(final)
        final = torch.cat(finals)
        final = final.mT if state_v_first else final
        return torch.cat(outputs, 1), final if output_final_state else None

    return op


def grouped(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2)


def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **states: Any) -> tuple[Tensor, Tensor]:
    o, S = delta_rule_recurrence(*(x.transpose(1, 2) for x in (q, k, v, beta)), **states)
    return o.transpose(1, 2), S


def gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    **states: Any,
) -> tuple[Tensor, Tensor]:
    if use_gate_in_kernel:
        g = -A_log.exp() * F.softplus(g + dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    g = torch.zeros_like(beta) if g is None else g
    q, k = grouped(q, v.shape[2]), grouped(k, v.shape[2])
    return naive_recurrent_gated_delta_rule(q, k, v, beta, g, **states)


def product(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return naive_recurrent_gated_delta_product(q, k, v, scale=q.shape[-1] ** -0.5, **given)


def kda(
    g: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float | None,
    allow_neg_eigval: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    safe_gate: bool = False,
    **given: Any,
) -> tuple[Tensor, Tensor]:
    assert use_gate_in_kernel and use_beta_sigmoid_in_kernel
    beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    if lower_bound is None:
        g = naive_kda_gate(g, A_log, dt_bias)
    else:
        g = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
    return naive_recurrent_kda(g=g, beta=beta, **given)


def convolution(
    self: nn.Conv1d,
    x: Tensor,
    cache: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    width = self.kernel_size[0]
    if cu_seqlens is not None:
        ends, states = cu_seqlens.tolist(), []
        outputs = []
        for n, (start, end) in enumerate(pairwise(ends)):
            before = None if cache is None else cache[n : n + 1]
            y, state = convolution(self, x[:, start:end], before, output_final_state)
            outputs.append(y)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states) if output_final_state else None
    before = x.new_zeros(len(x), x.shape[2], width) if cache is None else cache
    seen = torch.cat([before, x.mT], -1)
    y = F.conv1d(seen[..., 1:], self.weight, self.bias, groups=self.groups)
    y = F.silu(y) if self.activation else y
    return y.mT, seen[..., seen.shape[-1] - width :] if output_final_state else None


def functional_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, None]:
    y = F.conv1d(
        F.pad(x.mT, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), bias, groups=x.shape[2]
    )
    return F.silu(y).mT, None


def gated_norm(self: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    act = F.sigmoid if self.activation == "sigmoid" else F.silu
    return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * act(g)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    rules = {
        "DeltaNet": ("delta_rule", delta),
        "GatedDeltaNet": ("gated_delta_rule", gated),
        "KimiDeltaAttention": ("kda", kda),
        "GatedDeltaNet2": ("gdn2", naive_recurrent_gdn2),
    }
    for kind, (name, rule) in rules.items():
        for form in ("chunk", "fused_recurrent"):
            monkeypatch.setattr(FLA[kind], f"{form}_{name}", packed(rule))
    products = FLA["GatedDeltaProduct"]
    monkeypatch.setattr(products, "chunk_gated_delta_product", packed(product))
    monkeypatch.setattr(products, "fused_recurrent_gated_delta_rule", packed(gated))
    monkeypatch.setattr(FLA["GatedDeltaNet"], "causal_conv1d", functional_convolution)
    monkeypatch.setattr(ShortConvolution, "forward", convolution)
    monkeypatch.setattr(FusedRMSNormGated, "forward", gated_norm)
    monkeypatch.setattr(
        RMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pair(kind: str, arguments: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """fla's layer and ours of one seed."""
    torch.manual_seed(1)
    theirs = getattr(FLA[kind], kind)(**arguments, layer_idx=0)
    torch.manual_seed(1)
    return theirs, getattr(fnn, kind)(**arguments)


def ids(value: object) -> str:
    if isinstance(value, str):
        return value
    return " ".join(f"{k}={v}" for k, v in value.items() if k not in HEADS) or "default"


each_layer = pytest.mark.parametrize(("kind", "arguments"), LAYERS, ids=ids)


@pytest.mark.parametrize("kind", FLA)
def test_constructor_is_that_of_fla(kind: str) -> None:
    def arguments(layer: type) -> list[tuple[str, object]]:
        parameters = inspect.signature(layer).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is not p.VAR_KEYWORD]

    assert arguments(getattr(fnn, kind)) == arguments(getattr(FLA[kind], kind))


@each_layer
def test_one_seed_gives_the_weights_of_fla(kind: str, arguments: dict[str, Any]) -> None:
    theirs, ours = pair(kind, arguments)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name

    def unmarked(layer: nn.Module) -> list[str]:
        return [n for n, p in layer.named_parameters() if not hasattr(p, "_no_weight_decay")]

    assert unmarked(ours) == unmarked(theirs)


@each_layer
def test_output_and_gradients_are_those_of_fla(kind: str, arguments: dict[str, Any]) -> None:
    theirs, ours = pair(kind, arguments)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 21, WIDTH)
    expected, y = theirs(x)[0], ours(x)[0]
    assert_close(y, expected, tolerance=TOLERANCE)
    direction = torch.randn_like(y)
    wanted = torch.autograd.grad((expected * direction).sum(), list(theirs.parameters()))
    found = torch.autograd.grad((y * direction).sum(), list(ours.parameters()))
    for (name, _), a, b in zip(ours.named_parameters(), found, wanted, strict=True):
        assert_close(a, b, tolerance=10 * TOLERANCE, what=name)


@each_layer
def test_padding_is_read_as_fla_reads_it(kind: str, arguments: dict[str, Any]) -> None:
    theirs, ours = pair(kind, arguments)
    x = torch.randn(3, 12, WIDTH)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5], mask[1, 9:] = 0, 0
    assert_close(ours(x, attention_mask=mask)[0], theirs(x, mask)[0], tolerance=TOLERANCE)


@each_layer
def test_prompt_and_decoding_are_those_of_fla(kind: str, arguments: dict[str, Any]) -> None:
    theirs, ours = pair(kind, arguments)
    theirs.eval()
    x = torch.randn(2, 12, WIDTH)
    cache = Cache()
    with torch.no_grad():
        expected = theirs(x, past_key_values=cache, use_cache=True)[0]
        y, state = ours(x, output_final_state=True)
        assert_close(y, expected, tolerance=TOLERANCE, what="prompt")
        memory = cache[0]["recurrent_state"]
        if kind in ("GatedDeltaNet", "KimiDeltaAttention"):  # fla keeps these [V, K]
            memory = memory.mT
        assert_close(state.memory, memory, tolerance=TOLERANCE, what="memory")
        windows = cache[0]["conv_state"] or ()
        assert_close(
            state.convolutions, tuple(w[..., 1:] for w in windows), tolerance=TOLERANCE, what="conv"
        )
        for t in range(5):
            token = torch.randn(2, WIDTH)
            expected = theirs(token.unsqueeze(1), past_key_values=cache, use_cache=True)[0]
            y = ours.step(token, state)
            assert_close(y, expected.squeeze(1), tolerance=TOLERANCE, what=f"token {t}")
