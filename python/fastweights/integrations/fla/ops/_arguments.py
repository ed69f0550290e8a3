"""What fla's functions accept, refuse and warn of in the same words."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def check_packing(x: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> None:
    """Refuse packed sequences in more than one row, and states that are not one per sequence.

    Raises:
        ValueError: in fla's words.
    """
    if cu_seqlens is None:
        return
    if x.shape[0] != 1:
        raise ValueError(
            f"The batch size is expected to be 1 rather than {x.shape[0]} when using `cu_seqlens`. "
            "Please flatten variable-length inputs before processing."
        )
    sequences = len(cu_seqlens) - 1
    if initial_state is not None and initial_state.shape[0] != sequences:
        raise ValueError(
            "The number of initial states is expected to be equal to the number of input "
            f"sequences, i.e., {sequences} rather than {initial_state.shape[0]}."
        )


def refuse_head_first(kwargs: dict[str, Any]) -> None:
    """Refuse the layout argument that fla removed, whatever its value.

    Raises:
        DeprecationWarning: as an exception, like fla.
    """
    if "head_first" in kwargs:
        raise DeprecationWarning(
            "head_first has been removed. Inputs must be in `[B, T, H, ...]` format."
        )


def refuse_context_parallel(cp_context: object) -> None:
    """Refuse a sequence that is spread over processes.

    Raises:
        NotImplementedError: `cp_context` is not None.
    """
    if cp_context is not None:
        raise NotImplementedError("`cp_context`: context parallelism is not supported on a CPU.")


def layout(state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """`state_v_first`, also under its former name, which warns.

    Raises:
        ValueError: both names at once.
    """
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ValueError(
            "Cannot pass both `state_v_first` and the deprecated `transpose_state_layout`."
        )
    warnings.warn(
        "`transpose_state_layout` is deprecated and renamed to `state_v_first`.",
        DeprecationWarning,
        stacklevel=3,
    )
    return bool(kwargs["transpose_state_layout"])


def expect(condition: bool, message: str) -> None:
    """`assert` as fla has it, which `python -O` keeps.

    Raises:
        AssertionError: the condition does not hold.
    """
    if not condition:
        raise AssertionError(message)


def state_dtype(x: Tensor) -> torch.dtype:
    """What states are kept in: float32, for float64 inputs float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def state(initial_state: Tensor | None, x: Tensor) -> Tensor | None:
    """An initial state of any floating dtype as our ops take it."""
    return None if initial_state is None else initial_state.to(state_dtype(x))


def expect_state_dtype(initial_state: Tensor | None, x: Tensor) -> None:
    """Refuse an initial state that is not float32, as fla's GLA, KDA and GDN-2 do.

    Raises:
        AssertionError: another dtype (float64 inputs have a float64 state).
    """
    if initial_state is not None:
        wanted = state_dtype(x)
        name = str(wanted).removeprefix("torch.")
        expect(initial_state.dtype == wanted, f"initial_state must be in {name}.")


def refuse_negative_eigenvalues_without_sigmoid(allow: bool, use_beta_sigmoid: bool) -> None:
    """Refuse `allow_neg_eigval` where beta is not raw.

    Raises:
        ValueError: in fla's words.
    """
    if allow and not use_beta_sigmoid:
        raise ValueError("`allow_neg_eigval=True` requires `use_beta_sigmoid_in_kernel=True`.")
