"""The generic tests fail on what they are for: a toy op, sound and then broken in one way each."""

import dataclasses

import pytest
import torch

from fastweights.testing import BadInput, OpSpec, Tolerance, checks, contract, recurrence, sample

LIBRARY = torch.library.Library("fastweights", "FRAGMENT")
LIBRARY.define("toy_scan(Tensor x, float decay, Tensor? initial_state) -> (Tensor o, Tensor state)")
LIBRARY.define(
    "toy_scan_backward(Tensor do, Tensor dstate, float decay) -> (Tensor dx, Tensor dinitial)"
)


def _forward(x, decay, initial_state):
    if x.dim() != 3:
        raise RuntimeError(f"toy_scan: expected x of shape [B, T, D], got {list(x.shape)}")
    if not x.is_floating_point():
        raise RuntimeError(f"toy_scan: expected x of a floating dtype, got {x.dtype}")
    state = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state.clone()
    if state.shape != (x.shape[0], x.shape[2]) or state.dtype != x.dtype:
        raise RuntimeError("toy_scan: expected initial_state of shape [B, D] and x's dtype")
    o = torch.empty(x.shape, dtype=x.dtype)
    for t in range(x.shape[1]):
        state = state * decay + x[:, t]
        o[:, t] = state
    return o, state.contiguous()


def _backward(do, dstate, decay):
    dx, carry = torch.empty(do.shape, dtype=do.dtype), dstate.clone()
    for t in reversed(range(do.shape[1])):
        carry = carry + do[:, t]
        dx[:, t] = carry
        carry = carry * decay
    return dx, carry.contiguous()


LIBRARY.impl("toy_scan", _forward, "CPU")
LIBRARY.impl("toy_scan_backward", _backward, "CPU")


@torch.library.register_fake("fastweights::toy_scan")
def _(x, decay, initial_state):
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2])


@torch.library.register_fake("fastweights::toy_scan_backward")
def _(do, dstate, decay):
    return torch.empty_like(do), torch.empty_like(dstate)


def _setup(ctx, inputs, output):
    ctx.decay, ctx.has_state = inputs[1], inputs[2] is not None


def _grad(ctx, do, dstate):
    dx, dinitial = torch.ops.fastweights.toy_scan_backward(do, dstate, ctx.decay)
    return dx, None, dinitial if ctx.has_state else None


def _refuse(ctx, *grads):
    raise RuntimeError("double backward is not supported; use fastweights.reference.toy_scan")


torch.library.register_autograd("fastweights::toy_scan", _grad, setup_context=_setup)
torch.library.register_autograd("fastweights::toy_scan_backward", _refuse)


def toy_scan(x, *, decay=0.5, initial_state=None, output_final_state=False):
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError("toy_scan: no forward mode")
    o, state = torch.ops.fastweights.toy_scan(x, decay, initial_state)
    return o, state if output_final_state else None


def reference(x, *, decay=0.5, initial_state=None, output_final_state=False):
    state = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        state = state * decay + x[:, t]
        outputs.append(state)
    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(x)
    return o, state if output_final_state else None


def toy_step(x, *, decay=0.5, state):
    state.mul_(decay).add_(x)
    return state.clone()


def samples(dtype):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    return [
        sample(draw(2, 5, 3)),
        sample(draw(2, 4, 3), decay=0.9, initial_state=draw(2, 3), output_final_state=True),
        sample(draw(2, 0, 3), output_final_state=True),
    ]


SPEC = OpSpec(
    name="toy_scan",
    family="toy",
    function=toy_scan,
    reference=reference,
    samples=samples,
    tolerances={torch.float32: Tolerance(1e-6, 1e-6), torch.float64: Tolerance(1e-12, 1e-12)}
    | {torch.bfloat16: Tolerance(3e-2, 3e-2), torch.float16: Tolerance(4e-3, 4e-3)},
    differentiable=("x", "initial_state"),
    gradcheck=lambda: samples(torch.float64)[:2],
    bad_inputs=[BadInput(lambda: toy_scan(torch.ones(3)), RuntimeError, r"toy_scan: expected x")],
    time=("x",),
    step=toy_step,
)


def test_a_sound_op_passes():
    for dtype in SPEC.tolerances:
        checks.matches_reference(SPEC, dtype)
    checks.gradcheck(SPEC)
    checks.opcheck(SPEC)
    checks.reads_any_strides(SPEC)
    checks.ignores_thread_count(SPEC)
    checks.compiles(SPEC)
    recurrence.resumes_anywhere(SPEC)
    recurrence.continues_by_steps(SPEC)
    contract.raises_on_bad_input(SPEC)
    contract.survives_nonsense(SPEC)
    contract.has_the_signature_of_its_reference(SPEC)
    contract.refuses_unsupported_derivatives(SPEC)


def broken(change, **fields):
    """The spec with `change(outputs)` applied to what the function returns."""

    def function(x, *, decay=0.5, initial_state=None, output_final_state=False):
        given = toy_scan(
            x, decay=decay, initial_state=initial_state, output_final_state=output_final_state
        )
        return change(*given, x)

    return dataclasses.replace(SPEC, **({"function": function} | fields))


def _unwritten(o, state, x):
    out = torch.empty(x.shape, dtype=x.dtype)
    out[:, :-1] = o[:, :-1]
    return out, state


def _strides(o, state, x):
    return (o if x.is_contiguous() else o + 1e-6), state


def _threads(o, state, x):
    return o + 1e-6 * torch.get_num_threads(), state


FORGETFUL = broken(lambda o, state, x: (o, state if state is None else state * 0.999))
BROKEN = {
    "a wrong value": (broken(lambda o, s, x: (o + 1e-4, s)), checks.matches_reference),
    "a wrong gradient": (broken(lambda o, s, x: (o + x - x.detach(), s)), checks.matches_reference),
    "another dtype": (broken(lambda o, s, x: (o.double(), s)), checks.matches_reference),
    "an unwritten output": (broken(_unwritten), checks.matches_reference),
    "a wrong derivative": (broken(lambda o, s, x: (o * o.detach(), s)), checks.gradcheck),
    "strides": (broken(_strides), checks.reads_any_strides),
    "threads": (broken(_threads), checks.ignores_thread_count),
    "a wrong final state": (FORGETFUL, recurrence.resumes_anywhere),
    "a step unlike the op": (
        dataclasses.replace(SPEC, step=lambda x, *, decay=0.5, state: toy_step(x, state=state)),
        recurrence.continues_by_steps,
    ),
    "another message": (
        dataclasses.replace(SPEC, bad_inputs=[SPEC.bad_inputs[0]._replace(message="other")]),
        contract.raises_on_bad_input,
    ),
    "no error": (
        dataclasses.replace(SPEC, bad_inputs=[SPEC.bad_inputs[0]._replace(call=lambda: None)]),
        contract.raises_on_bad_input,
    ),
    "an unlisted dtype": (
        dataclasses.replace(SPEC, tolerances={torch.float32: Tolerance(1e-6, 1e-6)}),
        contract.raises_on_bad_input,
    ),
    "another default": (
        dataclasses.replace(SPEC, reference=lambda x, *, decay=0.4: None),
        contract.has_the_signature_of_its_reference,
    ),
    "a second derivative": (
        dataclasses.replace(SPEC, function=reference),
        contract.refuses_unsupported_derivatives,
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_is_found(fault):
    spec, check = BROKEN[fault]
    arguments = (torch.float32,) if check is checks.matches_reference else ()
    with pytest.raises(AssertionError):
        check(spec, *arguments)
