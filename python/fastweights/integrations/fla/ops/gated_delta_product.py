"""`fla.ops.gated_delta_product`: several delta updates for every token, and one decay."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from fastweights.integrations.fla.ops import _arguments
from fastweights.ops.delta_rule.functional import delta_rule

__all__ = ["chunk_gated_delta_product"]


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_delta_product` of fla by `fastweights.delta_rule`; also in float32.

    It is the gated delta rule on T * n rows, where only the first row of a token decays the state
    and only the last one is read.

    Args:
        q: [B, T, H, K].
        k: [B, T * n, H, K], n = `num_householder`.
        v: [B, T * n, H, V].
        g: log-decay [B, T, H], or None.
        beta: [B, T * n, H].
        num_householder: n, delta updates for a token.
        scale: of q; None means K ** -0.5.
        initial_state: [N, H, K, V], any floating dtype.
        output_final_state: also return the last state, else None.
        use_qk_l2norm_in_kernel: divide q and k by their norms first.
        cu_seqlens: [N + 1] in tokens, B = 1.
        cu_seqlens_cpu: ignored.
        cp_context: only None.

    Returns:
        o [B, T, H, V] in q's dtype and the final state in float32.

    Raises:
        AssertionError: shapes that do not fit.
        ValueError: packing with B > 1, a wrong number of states.
        NotImplementedError: `cp_context`.
    """
    n, (B, T, H, K), V = num_householder, q.shape, v.shape[-1]
    for name, x, shape in (
        ("k", k, (B, T * n, H, K)),
        ("v", v, (B, T * n, H, V)),
        ("beta", beta, (B, T * n, H)),
        ("g", g, (B, T, H)),
    ):
        _arguments.expect(
            x is None or x.shape == shape,
            f"{name} must have shape {list(shape)}, got {None if x is None else list(x.shape)}.",
        )
    _arguments.refuse_context_parallel(cp_context)
    _arguments.check_packing(q, cu_seqlens, initial_state)
    rows = pad(q.unsqueeze(2), (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
    decay = None if g is None else pad(g.unsqueeze(2), (0, 0, 0, n - 1)).flatten(1, 2)
    o, state = delta_rule(
        rows,
        k,
        v,
        beta=beta,
        g=decay,
        scale=scale,
        qk_l2norm=use_qk_l2norm_in_kernel,
        initial_state=_arguments.state(initial_state, q),
        output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens * n,
    )
    return o[:, n - 1 :: n].contiguous(), state
