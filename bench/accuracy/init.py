# SPDX-License-Identifier: Apache-2.0
"""Initial weights from which looking things up is learnt early.

To find what followed a word earlier, a token must know its predecessors. Llama has no biases and
no embeddings of positions, so heads that look a fixed distance back take most of a short training
to appear; here the first layer starts with them. All weights are trained on as usual.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

CONSTANT = 0
"""Dimension of the embedding that is the same for all tokens: it stands in for a bias."""
EMBEDDING_STD = 0.08
"""Large for Llama: a word's code must last while heads learn to compare codes."""
_PLANES = 10
"""Of RoPE, the fastest: slower ones hardly tell neighbours apart."""
_GAIN = 6.0
"""Length of a query's and a key's part in each plane."""


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Make query head i of the first layer attend to the token i + 1 places back."""
    config, attention = model.config, model.model.layers[0].self_attn
    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=EMBEDDING_STD)
    embedding[:, CONSTANT] = EMBEDDING_STD * config.hidden_size**0.5
    # What RMSNorm makes of the constant, half of the squared length being its own.
    constant = (config.hidden_size / 2) ** 0.5
    half = config.head_dim // 2
    planes = torch.arange(_PLANES)
    theta = config.rope_parameters["rope_theta"] ** (-planes / half)
    keys = attention.k_proj.weight.view(config.num_key_value_heads, config.head_dim, -1)
    keys[:, planes, CONSTANT] = _GAIN / constant
    queries = attention.q_proj.weight.view(config.num_attention_heads, config.head_dim, -1)
    for head in range(config.num_attention_heads):
        angle = -theta * (head + 1)
        queries[head, planes, CONSTANT] = _GAIN / constant * angle.cos()
        queries[head, half + planes, CONSTANT] = _GAIN / constant * angle.sin()
