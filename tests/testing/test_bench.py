"""The benchmark on a toy op: who is timed, what is written, and that red stays silent."""

import dataclasses
import json

import pytest
import torch

import fastweights.testing.bench as bench
from fastweights._tables import markdown_table, print_table
from fastweights.testing import BenchCase, OpSpec, Peer, Tolerance, roofline, sample
from fastweights.testing.results import HEADER, Row, cells
from fastweights.testing.support import HEADER as SUPPORT_HEADER
from fastweights.testing.support import support_rows


def double(x):
    return x * 2.0


def missing():
    raise ImportError("not installed")


SPEC = OpSpec(
    name="double",
    family="toy",
    function=double,
    reference=lambda x: x + x,
    samples=lambda dtype: [sample(torch.ones(3, dtype=dtype)), sample(torch.ones(0, dtype=dtype))],
    tolerances={torch.float32: Tolerance(0, 0)},
    differentiable=("x",),
    bench=[
        BenchCase(
            "n1000",
            make=lambda dtype: sample(torch.ones(1000, dtype=dtype)),
            flops=1e3,
            bytes=8e3,
            rows=1000,
        )
    ],
    peers=[
        Peer("absent", load=missing, adapt=lambda call: call),
        Peer("unfit", load=lambda: double, adapt=lambda call: None),
        Peer("rival", load=lambda: double, adapt=lambda call: call, matmul=True),
    ],
)
ROOF = roofline.Roofline(
    threads=2, flops_one=5e10, flops_all=1e11, read=1e10, copy=1e10, update=1e10
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(bench, "_BUDGET", 0.005)
    monkeypatch.setattr(roofline, "measure", lambda: ROOF)


def test_every_contender_that_can_run_is_timed():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = bench.time_case(SPEC, SPEC.bench[0], torch.float32)
    finally:
        torch.set_num_threads(before)
    names = [row.contender for row in rows]
    assert names == ["fastweights", "reference", "rival, highest", "rival, medium"]
    assert all(row.forward > 0 and row.both > row.forward / 2 for row in rows)
    assert rows[0].forward_one_thread is not None


def test_copies_are_taken_in_turn():
    seen = set()

    def recorded(x):
        seen.add(x.data_ptr())
        return double(x)

    spec = dataclasses.replace(SPEC, function=recorded, peers=[])
    case = dataclasses.replace(SPEC.bench[0], copies=3, backward=False, reference=False)
    bench.time_case(spec, case, torch.float32)
    assert len(seen) == 3


def test_gradients_come_in_the_memory_order_of_the_output():
    got = []

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            got.append(grad.stride())
            return 2 * grad

    call = sample(torch.ones(3, 5).T.requires_grad_())
    bench._both(Recorded.apply, call, list(call.tensors()))()
    assert got == [(1, 5)]


def test_settings_are_restored():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    bench.time_case(SPEC, SPEC.bench[0], torch.float32)
    assert before == (torch.get_num_threads(), torch.get_float32_matmul_precision())


def test_results_are_written_and_merged(tmp_path, monkeypatch, capsys):
    other = dataclasses.replace(SPEC, name="twice")
    monkeypatch.setattr(bench, "all_specs", lambda: [SPEC, other])
    assert bench.bench(["double"], out=tmp_path) == 0
    assert bench.bench(["twice"], out=tmp_path) == 0
    assert "rival, medium" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "toy.json").read_text())) == ["double", "twice"]
    page = (tmp_path / "toy.md").read_text()
    assert "## double" in page and "## twice" in page and "FMA peak 50 GFLOP/s" in page


def test_a_wrong_op_is_not_timed(monkeypatch, capsys):
    wrong = dataclasses.replace(SPEC, function=lambda x: x * 2.001)
    monkeypatch.setattr(bench, "all_specs", lambda: [wrong])
    monkeypatch.setattr(bench, "time_case", lambda *_: pytest.fail("timed"))
    assert bench.bench() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "double is wrong" in captured.err


def test_an_unknown_name_is_said(monkeypatch, capsys):
    monkeypatch.setattr(bench, "all_specs", lambda: [SPEC])
    assert bench.bench(["binary"]) == 1
    assert "expected ops among double, got binary" in capsys.readouterr().err


def test_shares_are_of_the_measured_ceilings():
    row = Row("c", "float32", "fastweights", 1e-3, 2e-3, 1.8e-3, flops=5e7, bytes=1e6, rows=1000)
    got = dict(zip(HEADER, cells([row], ROOF)[0], strict=True))
    assert got["% FMA peak"] == "50"
    assert got["% bandwidth"] == "10"
    assert got["ns/token/head"] == "1000"
    assert got["threads ×"] == "1.80"


def test_ceilings_are_plausible():
    assert 1e8 < roofline.peak_flops(1) < 1e13
    assert 1e8 < roofline.peak_flops(2) < 1e13


def test_support_matrix_has_a_row_per_op():
    rows = support_rows()
    assert rows and all(len(row) == len(SUPPORT_HEADER) for row in rows)
    assert {row[2] for row in rows} <= {"kernel", "reference", "composite"}


def test_tables(capsys):
    text = markdown_table(["name", "n"], [["a", "1"], ["bc", "23"]])
    assert text.splitlines() == ["| name |  n |", "| ---- | -: |", "| a    |  1 |", "| bc   | 23 |"]
    print_table(["name"], [["value"]])
    assert "value" in capsys.readouterr().out
