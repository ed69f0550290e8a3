"""Tiny random models of transformers whose layers use a delta rule or a short convolution."""

from __future__ import annotations

import importlib
from typing import Any

import torch

VOCAB = 96
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.06,
    "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32,
}  # fmt: skip
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_INKLING = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "unpadded_vocab_size": VOCAB, "layer_types": ["hybrid_sliding", "hybrid"],
}  # fmt: skip
_LAYERS = ["linear_attention", "full_attention"]
_KDA = {"linear_head_dim": 16, "linear_num_heads": 4}
_GLM = _SIZES | _LATENT | _KDA | {
    "layer_types": ["linear_attention", "indexed_attention"], "qk_rope_head_dim": 0,
    "q_lora_rank": 16, "n_routed_experts": 4, "index_head_dim": 16, "index_n_heads": 2,
    "index_topk": 16, "index_kpool": 4, "hc_mult": 2, "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
_VISION = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 64,
    "projection_intermediate_size": 16,
}  # fmt: skip
_LOOP = {
    "num_hidden_layers": 3, "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1,
    "loop_layer_index_end": 2, "loop_gate_rank": 4,
    "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
}  # fmt: skip
_MAMBA = {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4}
_MAMBA_1 = {"mamba_d_state": 8, "mamba_dt_rank": 4}
_JAMBA = _MAMBA_1 | {"attn_layer_period": 2, "attn_layer_offset": 1}
_MAMBA_2 = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_d_state": 8,
    "mamba_n_groups": 1, "mamba_expand": 2,
}  # fmt: skip
_ZAMBA_2 = {
    "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16,
    "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1,
}  # fmt: skip
_NEMOTRON = {
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
    "layers_block_type": ["mamba", "attention"],
}  # fmt: skip


def _linear(H: int, HV: int, K: int, V: int) -> dict[str, Any]:
    return {
        "linear_num_key_heads": H, "linear_num_value_heads": HV, "linear_key_head_dim": K,
        "linear_value_head_dim": V, "layer_types": _LAYERS,
    }  # fmt: skip


# Family -> the class of its configuration, and what makes it small.
GATED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", _linear(2, 4, 16, 24) | _EXPERTS),
    "qwen3_5": ("Qwen3_5TextConfig", _linear(2, 2, 16, 16)),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", _linear(1, 4, 16, 16) | _EXPERTS),
    "qwen4_exp": ("Qwen4ExpTextConfig", _linear(2, 4, 16, 16) | _EXPERTS | _INDEXER),
    "lara_mini": ("LaraMiniConfig", _linear(2, 4, 16, 16) | _EXPERTS),
    "olmo_hybrid": ("OlmoHybridConfig", _linear(4, 4, 12, 24)),
}
KDA: dict[str, tuple[str, dict[str, Any]]] = {
    "kimi_linear": ("KimiLinearConfig", _LATENT | _KDA | {"layer_types": _LAYERS}),
    "bailing_hybrid": ("BailingHybridConfig", _LATENT | {"layer_types": _LAYERS}),
    "glm5_next": ("Glm5NextConfig", {"text_config": _GLM, "vision_config": _VISION}),
}
CONVOLUTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "conv_bias": True}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "lfm3": ("Lfm3Config", {"layer_types": ["conv", "full_attention"]}),
    "inkling": ("InklingTextConfig", _INKLING | {"mlp_layer_types": ["dense", "sparse"]}),
    "inkling2": ("Inkling2TextConfig", _INKLING | {"n_layers_per_attn_res_block": 1}),
    "inkling2_loop": ("Inkling2LoopTextConfig", _INKLING | _LOOP),
    "mamba": ("MambaConfig", _MAMBA),
    "falcon_mamba": ("FalconMambaConfig", _MAMBA),
    "jamba": ("JambaConfig", _EXPERTS | _JAMBA),
    "zamba": (
        "ZambaConfig",
        _MAMBA_1 | {"n_mamba_heads": 2, "layers_block_type": ["mamba", "hybrid"]},
    ),
    "mamba2": ("Mamba2Config", _MAMBA | {"num_heads": 8, "head_dim": 16, "n_groups": 1}),
    "bamba": ("BambaConfig", _MAMBA_2 | {"attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1Config", _MAMBA_2),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        _MAMBA_2
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32}
        | {"layer_types": ["mamba", "attention"]},
    ),
    "nemotron_h": ("NemotronHConfig", _NEMOTRON),
    "zamba2": ("Zamba2Config", _ZAMBA_2),
}
FAMILIES = GATED | KDA | CONVOLUTIONS


def recurrent_model(family: str, **changes: Any) -> Any:
    """The causal language model of a family, in evaluation mode."""
    import transformers

    name, sizes = FAMILIES[family]
    config = getattr(transformers, name)(**_SIZES | sizes | changes)
    auto = transformers.AutoModelForCausalLM
    if "text_config" in sizes:
        auto = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def modeling(family: str) -> Any:
    """The module of a family."""
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")
