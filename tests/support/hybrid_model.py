# SPDX-License-Identifier: Apache-2.0
"""Writes small random models whose layers are attention and something linear, in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from tests.support.demo_model import MIN_VOCAB, write_tokenizer

ATTENTION_LAYERS = (1, 3)
_COMMON: dict[str, Any] = {
    "vocab_size": MIN_VOCAB,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
    "pad_token_id": 256,
    "bos_token_id": None,
}
_LOGIT_STD = 4.0


def write_granite(path: Path) -> Path:
    """Granite 4: Mamba2 layers, attention without positions, no experts. Returns the folder."""
    config = GraniteMoeHybridConfig(
        **_COMMON,
        hidden_size=256,
        shared_intermediate_size=256,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=["mamba", "attention"] * 2,
        mamba_n_heads=8,
        mamba_d_head=64,
        mamba_n_groups=1,
        mamba_d_state=32,
        mamba_chunk_size=64,
        position_embedding_type="nope",
        attention_multiplier=0.125,
    )
    return _write(path, config, GraniteMoeHybridForCausalLM)


def write_qwen(path: Path) -> Path:
    """Qwen3.5: gated delta layers. Returns the folder."""
    config = Qwen3_5TextConfig(
        **_COMMON,
        hidden_size=128,
        intermediate_size=256,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        layer_types=["linear_attention", "full_attention"] * 2,
        full_attention_interval=2,  # which SGLang reads instead
    )
    return _write(path, config, Qwen3_5ForCausalLM)


def _write(path: Path, config: PretrainedConfig, kind: type[PreTrainedModel]) -> Path:
    """With weights that keep activations near unit size; only printable tokens are likely."""
    torch.manual_seed(0)
    model = kind(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.normal_(std=weight.shape[1] ** -0.5)
        head = model.get_output_embeddings().weight
        head *= _LOGIT_STD
        head[:32], head[127:] = 0, 0
    model.save_pretrained(path)
    write_tokenizer(path, MIN_VOCAB, config.max_position_embeddings)
    return path
