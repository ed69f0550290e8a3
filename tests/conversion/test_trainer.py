"""A converted model is one that Hugging Face's Trainer trains."""

import torch
from transformers import Trainer, TrainingArguments

import fastweights as fw
from fastweights.conversion import linearized_layers

from .conftest import tiny


def test_trainer_trains_every_part(tmp_path):
    model = fw.linearize(tiny(), window=4, feature_dim=6)
    layers = linearized_layers(model)
    before = [[p.detach().clone() for p in layer.parameters()] for layer in layers]
    row = torch.arange(24) % 7 + 3
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for _ in range(8)],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    for layer, old in zip(layers, before, strict=True):
        assert not any(torch.equal(p, q) for p, q in zip(layer.parameters(), old, strict=True))
