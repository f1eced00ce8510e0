# SPDX-License-Identifier: Apache-2.0
"""Small random models with sliding windows, soft caps and attention sinks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
)

from tests.support.demo_model import write_demo_model

WINDOW = 100
"""Tokens that a query of a window layer sees, its own included; no multiple of a page."""
HIDDEN = 128
SHARP = 4.0
"""Standard deviation of attention's scores: what a query sees decides what is said next."""

KINDS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"query_pre_attn_scalar": 64},
    ),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "hidden_act": "gelu_pytorch_tanh",  # SGLang's name of it
            "query_pre_attn_scalar": 64,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def write_window_model(path: Path, kind: str, layers: str) -> Path:
    """Write a model, with the demo model's tokenizer, to folder ``path``.

    Args:
        kind: one of `KINDS`.
        layers: one letter each: w has a window, f has none.
    """
    write_demo_model(path, layers=1)
    demo = json.loads((path / "config.json").read_text())
    names = {"w": "sliding_attention", "f": "full_attention"}
    config, model, own = KINDS[kind]
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=demo["vocab_size"],
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=len(layers),
            layer_types=[names[x] for x in layers],
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            sliding_window=WINDOW,
            max_position_embeddings=4096,
            eos_token_id=demo["eos_token_id"],
            bos_token_id=None,
            pad_token_id=None,
            **own,
        )
    )
    with torch.no_grad():
        for name, weight in made.named_parameters():
            _fill(name, weight, plain_norm=kind == "gpt_oss")
    made.save_pretrained(path)
    return path


def _fill(name: str, weight: torch.Tensor, plain_norm: bool) -> None:
    if "norm" in name:
        mean = SHARP if "q_norm" in name else 1.0
        weight.normal_(mean, 0.1).sub_(float(not plain_norm))  # Gemma's are 1 + weight
    elif "sinks" in name:
        weight.normal_(1, 1).copy_(weight.bfloat16().float())  # SGLang keeps them so
    elif "bias" in name:
        weight.normal_(0, 0.1)
    elif "embed" in name:
        weight.normal_(0, HIDDEN**-0.5)
    else:
        inputs = weight.shape[-2] if "experts" in name else weight.shape[-1]
        gain = SHARP if "q_proj" in name else 2.0
        weight.normal_(0, gain * inputs**-0.5)
