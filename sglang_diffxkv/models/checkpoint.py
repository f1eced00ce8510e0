# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint from a GGUF file."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import Digits, Sequence
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from sglang_diffxkv.models.known import KnownModel, ModelError


def write_checkpoint(model: KnownModel, gguf: Path, folder: Path) -> None:
    """Write weights in bfloat16, configuration, tokenizer and chat template into `folder`.

    Raises:
        ModelError: the file has not all of the model's weights.
    """
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Not `from_pretrained`: it needs accelerate, and its model would still be one of GGUF's blocks.
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    loaded = load_gguf_checkpoint(
        str(gguf), return_tensors=True, model_to_load=network, torch_dtype=torch.bfloat16
    )
    keys = network.load_state_dict(loaded["tensors"], strict=False, assign=True)
    missing = set(keys.missing_keys) - set(network.all_tied_weights_keys)
    if missing or keys.unexpected_keys:
        raise ModelError(f"{gguf.name} is not of this model: {missing or keys.unexpected_keys}")
    network.tie_weights()
    network.save_pretrained(folder)
    _tokenizer(model, gguf).save_pretrained(folder)


def _tokenizer(model: KnownModel, gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, with what transformers leaves out when it reads one from a GGUF file."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    if model.splits_digits:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    if model.adds_bos:
        bos = tokenizer.bos_token
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )
    return tokenizer
