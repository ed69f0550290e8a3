"""Scaled-down models of transformers, as they are and patched, in turn in one process.

    python benchmarks/transformers_patch.py [MODEL-DTYPE ...]

writes benchmarks/results/transformers_patch.json and .md. Before anything is timed the two must
agree on logits and on greedily decoded tokens.
"""

import contextlib
import datetime
import functools
import importlib
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile, record_function

from fastweights._tables import markdown_table
from fastweights.integrations.transformers import patched
from fastweights.testing import machine

RESULTS = Path(__file__).parent / "results"
# A quarter of the widths and of the heads of Qwen3-Next-80B-A3B and Kimi-Linear-48B-A3B. The sizes
# of a head, the order of the layers and the convolution are the real ones; layers, experts and
# vocabulary are fewer, so that they have about 100 million parameters.
MODELS = {
    "qwen3_next": ("Qwen3NextConfig", {
        "vocab_size": 16384, "hidden_size": 512, "num_hidden_layers": 12,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    }),
    "kimi_linear": ("KimiLinearConfig", {
        "vocab_size": 16384, "hidden_size": 576, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 128,
        "linear_num_heads": 8, "linear_head_dim": 128,
        "num_local_experts": 16, "num_experts_per_tok": 2,
        "intermediate_size": 2304, "moe_intermediate_size": 256,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }),
}  # fmt: skip
CASES = ("qwen3_next-float32", "qwen3_next-bfloat16", "kimi_linear-float32")
PROMPT, STEPS, ROUNDS = 512, 32, 3
WAYS = {"as it is": contextlib.nullcontext, "patched": patched}
# The parts of the time: functions that `patch` replaces, by what their names contain, and ops.
CALLS = {"delta rule": "delta_", "short convolution": "causal_conv1d", "gated norm": "RMSNormGated"}
OPS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "softmax attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}


def build(name, **changes):
    """A model whose decays are those that Gated DeltaNet is trained from.

    With the random ones of transformers a state is forgotten within a token.
    """
    torch.manual_seed(0)
    config, sizes = MODELS[name]
    config = getattr(transformers, config)(**sizes | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if hasattr(module, "dt_bias"):
            dt = torch.empty_like(module.dt_bias).uniform_(-6.9, -2.3).exp()  # 0.001 to 0.1
            module.dt_bias.data.copy_(dt + torch.log(-torch.expm1(-dt)))
    return model


class Work:
    """What is timed: name -> (a call, tokens that it treats)."""

    def __init__(self, model, prompt):
        self.model, self.prompt = model, prompt
        self.ids = torch.randint(model.config.vocab_size, (1, prompt))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        self.tasks = {
            "prefill": (self.prefill, prompt),
            "training": (self.train, prompt),
            "decoding": (self.decode, STEPS),
        }

    def prefill(self):
        with torch.inference_mode():
            return self.model.eval()(self.ids, logits_to_keep=1).logits

    def train(self):
        loss = self.model.train()(self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @functools.cached_property
    def cache(self):
        """After a prompt; decoding goes on from where it was."""
        cache = transformers.DynamicCache(config=self.model.config)
        with torch.inference_mode():
            self.model.eval()(self.ids[:, : self.prompt // 4], cache=cache)
        return cache

    def decode(self):
        token, cache = self.ids[:, :1], self.cache
        with torch.inference_mode():
            for _ in range(STEPS):
                logits = self.model.eval()(token, cache=cache).logits
                token = logits[:, -1:].argmax(-1)


def check(model, prompt):
    """Same logits and tokens, or nothing is timed. In float32: a rounding changes experts."""
    ids = torch.randint(model.config.vocab_size, (1, prompt))
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}

    def run():
        with torch.inference_mode():
            return model.eval()(ids).logits, model.generate(ids[:, :8], **options)

    logits, text = run()
    with patched():
        got, got_text = run()
    torch.testing.assert_close(got, logits, rtol=0, atol=1e-4)
    assert torch.equal(text, got_text)


def seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextlib.contextmanager
def named_calls(name):
    """Lets a profile show the calls of `CALLS`, whoever serves them."""
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")

    def named(part, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            with record_function(part):
                return function(*args, **kwargs)

        return call

    replaced = []
    for attribute, value in list(vars(modeling).items()):
        part = next((part for part, text in CALLS.items() if text in attribute), None)
        if part is None:
            continue
        owner, key = (value, "forward") if isinstance(value, type) else (modeling, attribute)
        replaced.append((owner, key, getattr(owner, key)))
        setattr(owner, key, named(part, getattr(owner, key)))
    try:
        yield
    finally:
        for owner, key, function in replaced:
            setattr(owner, key, function)


def parts(name, call):
    """Milliseconds of one call by what they were spent on."""
    with named_calls(name), profile(activities=[ProfilerActivity.CPU]) as recorded:
        whole = seconds(call)
    events = {event.key: event for event in recorded.key_averages()}
    found = {part: events[part].cpu_time_total / 1e3 for part in CALLS}
    for part, ops in OPS.items():
        found[part] = sum(events[op].self_cpu_time_total for op in ops if op in events) / 1e3
    return found | {"the rest": max(0.0, 1e3 * whole - sum(found.values()))}


def measure(name, dtype, prompt, **changes):
    """Everything about one model and dtype."""
    model = build(name, **changes)
    check(model, min(prompt, 200))
    work = Work(model.to(dtype), prompt)
    best, spent = {}, {}
    for task, (call, _) in work.tasks.items():
        readings = {way: [] for way in WAYS}
        for way, context in [*WAYS.items()] * (1 + ROUNDS):
            with context():
                readings[way].append(seconds(call))
        best[task] = {way: min(taken[1:]) for way, taken in readings.items()}
        if task != "training":
            for way, context in WAYS.items():
                with context():
                    spent.setdefault(task, {})[way] = parts(name, call)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine.facts(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt": prompt,
        "tokens/s": {
            task: {way: work.tasks[task][1] / best[task][way] for way in WAYS} for task in best
        },
        "milliseconds": spent,
    }


def document(results):
    lines = [
        "# Models of transformers, as they are and patched",
        "",
        "Written by `python benchmarks/transformers_patch.py`: random weights, a quarter of the"
        " real widths and heads. Best of several readings, both in turn in one process. Training is"
        " forward, backward and AdamW. The milliseconds are of a profile, which adds to them.",
    ]
    for case, result in results.items():
        where = "; ".join(f"{name} {value}" for name, value in result["machine"].items())
        spent = result["milliseconds"]
        speeds = [
            (task, *(f"{row[w]:.1f}" for w in WAYS), f"{row['patched'] / row['as it is']:.2f}")
            for task, row in result["tokens/s"].items()
        ]
        columns = [(task, way) for task in spent for way in WAYS]
        times = [
            (part, *(f"{spent[task][way][part]:.0f}" for task, way in columns))
            for part in (*CALLS, *OPS, "the rest")
        ]
        lines += [
            "",
            f"## {case}",
            "",
            f"{result['date']}. {where}. {result['parameters'] / 1e6:.0f} million parameters,"
            f" {result['prompt']} tokens, {STEPS} decoded.",
            "",
            markdown_table(("tokens/s", *WAYS, "×"), speeds),
            "",
            markdown_table(("ms", *(f"{task}, {way}" for task, way in columns)), times),
        ]
    return "\n".join(lines) + "\n"


def main(cases, out=RESULTS):
    path = out / "transformers_patch.json"
    for case in cases or CASES:
        name, dtype = case.split("-")
        result = measure(name, getattr(torch, dtype), PROMPT)
        results = json.loads(path.read_text()) if path.exists() else {}
        results[case] = result
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(document(results))


if __name__ == "__main__":
    main(sys.argv[1:])
