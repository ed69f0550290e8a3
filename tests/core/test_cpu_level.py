import os
import subprocess
import sys

import pytest
import torch

from fastweights._load import _C
from fastweights.testing import available_cpu_levels, cpu_level


def in_a_new_process(level):
    code = "from fastweights._load import _C; print(_C.cpu_level())"
    environment = os.environ | {"FASTWEIGHTS_CPU_LEVEL": level}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_the_best_level_is_the_default():
    assert available_cpu_levels()[0] == "baseline"
    assert available_cpu_levels()[-1] == _C.best_cpu_level()


@pytest.mark.parametrize("level", available_cpu_levels())
def test_forced_by_environment(level):
    assert in_a_new_process(level).stdout.strip() == level


def test_a_bad_environment_value_is_an_import_error():
    result = in_a_new_process("avx1024")
    assert result.returncode != 0
    assert "cpu_level: expected one of baseline" in result.stderr
    assert "got 'avx1024'" in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("ImportError: fastweights")


def test_forced_within_a_block_and_restored():
    before = _C.cpu_level()
    for level in available_cpu_levels():
        with cpu_level(level):
            assert _C.cpu_level() == level
    assert _C.cpu_level() == before
    with pytest.raises(ZeroDivisionError), cpu_level("baseline"):
        1 / 0  # noqa: B018
    assert _C.cpu_level() == before


def test_a_level_the_machine_lacks_is_refused():
    missing = set(_C.build_facts()["cpu_levels"]) - set(available_cpu_levels())
    for level in {*missing, "sse9"}:
        with pytest.raises(RuntimeError, match=r"cpu_level: expected one of .* on this machine"):
            _C.set_cpu_level(level)


def test_levels_match_the_cpu_flags_that_torch_sees():
    capability = torch.backends.cpu.get_cpu_capability()
    expected = {"DEFAULT": "baseline", "AVX2": "avx2", "AVX512": "avx512"}
    if capability in expected and "ATEN_CPU_CAPABILITY" not in os.environ:
        assert expected[capability] in available_cpu_levels()
