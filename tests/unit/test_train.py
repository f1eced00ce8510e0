# SPDX-License-Identifier: Apache-2.0
"""Training of the demo model: its data, its first weights, and that it goes on where it stopped."""

from pathlib import Path

import pytest
import torch

from bench.accuracy.corpus import DRILL, Corpus
from bench.accuracy.train import CONTEXT, LENGTHS, MIX, Options, Trainer, export
from sglang_diffxkv.bundled_model import BUNDLED


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda model, **options: model)


def options(folder: Path, tokens: float) -> Options:
    return Options(folder, tokens, 256, 0, "cpu", 64, 2, 5e-3, 3e-3, 1e9)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(options(tmp_path_factory.mktemp("model"), 1e4))


@pytest.mark.parametrize("length", LENGTHS[:-1])
@pytest.mark.parametrize("task", [DRILL, *MIX])
def test_chats(trainer, task, length):
    batch = Corpus(trainer.tokenizer, 1).batch(length, 4 * length, {task: 1.0})
    again = Corpus(trainer.tokenizer, 1).batch(length, 4 * length, {task: 1.0})
    assert torch.equal(batch.ids, again.ids) and torch.equal(batch.weights, again.weights)
    assert batch.ids.shape == batch.weights.shape == (4, length)
    end = trainer.tokenizer.token_to_id("<|end|>")
    for row, weights, chat in zip(batch.ids, batch.weights, batch.chats, strict=True):
        assert len(chat.ids) == len(chat.weights) <= length
        assert row[: len(chat.ids)].tolist() == chat.ids
        assert not weights[len(chat.ids) :].any()
        assert chat.answers
        for begin, past in chat.answers:
            assert (weights[begin:past] == 1).all()
            assert task == DRILL or chat.ids[past - 1] == end


def test_drills_repeat_what_was_said(trainer):
    """A supervised token always follows as it did earlier."""
    corpus = Corpus(trainer.tokenizer, 2)
    for _ in range(40):
        (chat,) = corpus.batch(128, 128, {DRILL: 1.0}).chats
        for begin, past in chat.answers:
            for at in range(begin, past):
                asked = chat.ids[at]
                assert asked in chat.ids[:at]


def test_first_heads_look_back(trainer):
    model = Trainer(trainer.options).model
    model.set_attn_implementation("eager")
    batch = Corpus(trainer.tokenizer, 3).batch(128, 512, MIX)
    attention = model(batch.ids, output_attentions=True).attentions[0]
    for head in range(attention.shape[1]):
        back = attention[:, head].diagonal(-(head + 1), 1, 2)
        assert back[:, 8:].mean() > 0.7


def test_resumes(tmp_path, capsys):
    first = Trainer(options(tmp_path, 1024))
    first.run()
    assert first.seen == 1024
    second = Trainer(options(tmp_path, 2048))
    second.load()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
    assert (second.seen, second.step, second.accuracy) == (1024, 4, first.accuracy)
    second.run()
    assert second.seen == 2048
    export(second, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_bundled_model_is_what_it_should_be():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(BUNDLED)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.head_dim == 64
    assert config.num_hidden_layers >= 6
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.max_position_embeddings == CONTEXT
    assert (BUNDLED / "model.safetensors").stat().st_size <= 12e6
