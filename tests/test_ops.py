"""The generic tests over every op's spec. What each asserts is said in fastweights.testing."""

import pytest

from fastweights.testing import all_specs, checks, contract, recurrence

SPECS = all_specs()


def over(keep=lambda spec: True):
    return pytest.mark.parametrize("spec", [s for s in SPECS if keep(s)], ids=str)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        pytest.param(spec, dtype, id=f"{spec}-{str(dtype).removeprefix('torch.')}")
        for spec in SPECS
        for dtype in spec.tolerances
    ],
)
def test_matches_reference(spec, dtype):
    checks.matches_reference(spec, dtype)


@over(lambda spec: spec.differentiable)
def test_gradcheck(spec):
    checks.gradcheck(spec)


@over()
def test_opcheck(spec):
    checks.opcheck(spec)


@over()
def test_reads_any_strides(spec):
    checks.reads_any_strides(spec)


@over()
def test_ignores_thread_count(spec):
    checks.ignores_thread_count(spec)


@over()
def test_compiles(spec):
    checks.compiles(spec)


@over(lambda spec: spec.time)
def test_resumes_anywhere(spec):
    recurrence.resumes_anywhere(spec)


@over(lambda spec: spec.step)
def test_continues_by_steps(spec):
    recurrence.continues_by_steps(spec)


@over()
def test_raises_on_bad_input(spec):
    contract.raises_on_bad_input(spec)


@over()
def test_survives_nonsense(spec):
    contract.survives_nonsense(spec)


@over()
def test_signature_is_that_of_the_reference(spec):
    contract.has_the_signature_of_its_reference(spec)


@over()
def test_refuses_unsupported_derivatives(spec):
    contract.refuses_unsupported_derivatives(spec)


@over()
def test_samples_include_an_empty_tensor(spec):
    samples = spec.samples(spec.first_dtype)
    assert any(t.numel() == 0 for call in samples for t in call.tensors())


@over()
def test_bad_inputs_are_listed(spec):
    assert spec.bad_inputs


@over(lambda spec: spec.differentiable)
def test_gradcheck_has_samples(spec):
    assert list(spec.gradcheck())
