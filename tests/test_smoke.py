"""Under ten seconds: does it import, run, differentiate and say what it is?"""

import subprocess
import sys

import torch

import fastweights as fw


def test_forward_and_backward():
    q, k, v = (torch.rand(1, 70, 2, 16, requires_grad=True) for _ in range(3))
    o, state = fw.linear_attention(q, k, v, normalize=True)
    o.sum().backward()
    assert state is None
    assert torch.isfinite(o).all()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_decode_step_continues_a_prefix():
    q, k, v = (torch.rand(1, 9, 2, 16) for _ in range(3))
    expected, _ = fw.linear_attention(q, k, v)
    _, state = fw.linear_attention(q[:, :8], k[:, :8], v[:, :8], output_final_state=True)
    o = fw.linear_attention_step(q[:, 8], k[:, 8], v[:, 8], state=state)
    torch.testing.assert_close(o, expected[:, 8])


def test_show_config_names_what_a_bug_report_needs(capsys):
    fw.show_config()
    printed = capsys.readouterr().out
    for word in ("fastweights", "torch", "cpu level", "threads", "compiler"):
        assert word in printed


def test_import_is_light():
    heavy = "{'transformers', 'peft', 'gguf', 'matplotlib', 'rich', 'safetensors'}"
    code = f"import sys, fastweights; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
