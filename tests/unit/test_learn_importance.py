# SPDX-License-Identifier: Apache-2.0
"""Learning importance: what a second reading needs, pairs that RoPE turns, fits, a real model."""

from __future__ import annotations

import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import silu

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.calibrate.importance import fit as fit_module
from sglang_diffxkv.calibrate.importance import learn
from sglang_diffxkv.calibrate.importance.fit import (
    LEAST_NEEDED,
    Samples,
    explained,
    fit_importance,
)
from sglang_diffxkv.calibrate.importance.learn import SINKS, learn_importance
from sglang_diffxkv.calibrate.importance.reading import REQUEST, Read, TextReader, needed
from sglang_diffxkv.calibrate.importance.rotary import find_rotary, rotary_of
from sglang_diffxkv.calibrate.importance.scores import Scoring
from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.eval.model import Model, load_model
from sglang_diffxkv.eval.questions.prompts import make_cells
from sglang_diffxkv.eval.tasks.registry import choose_suite
from sglang_diffxkv.policy.importance.features import Rotary, feature_count
from sglang_diffxkv.policy.importance.model import ImportanceModel
from tests.support.builders import error_norm
from tests.support.rotary import turned

DIM = 32


def test_what_a_second_reading_needs() -> None:
    heads, group, first, last = 2, 3, 70, 301
    q, keys = torch.randn(heads * group, last, DIM), torch.randn(heads, first + last, DIM)
    found = needed(q, keys, first, Scoring(0.3))
    assert found.shape == (heads, first)
    expected = torch.zeros(heads * group, first, dtype=torch.float64)
    for head in range(heads * group):
        for i in range(last):
            scores = keys[head // group, : first + i + 1].double() @ q[head, i].double() * 0.3
            expected[head] += scores.softmax(0)[:first].square()
    assert error_norm(found, expected.view(heads, group, first).amax(1)) < 1e-5


@pytest.mark.parametrize(
    "rotary", [Rotary(DIM), Rotary(DIM, True), Rotary(12), Rotary(20, True), Rotary(2)]
)
@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_pairs_that_are_turned_are_found(rotary: Rotary, noise: float) -> None:
    keys = torch.randn(4, 60, DIM)
    there = turned(keys, rotary, 97.0)
    found = rotary_of(keys, there * (1 + noise * torch.randn(there.shape)))
    # Neighbours are found where no pair is turned, too: their lengths are the same.
    assert found.interleaved == rotary.interleaved or rotary.dims == 2
    assert found.dims >= rotary.dims if found.interleaved else found.dims == rotary.dims


def test_keys_that_change_otherwise_are_refused() -> None:
    with pytest.raises(ConfigError, match="in a way that is not known"):
        rotary_of(torch.randn(4, 60, DIM), torch.randn(4, 60, DIM))


def test_the_fit_finds_what_is_there_to_find() -> None:
    layers, heads, count, rotary = 2, 2, 3000, Rotary(DIM)
    inputs = feature_count(DIM, rotary)
    truth = torch.randn(layers, heads, inputs, 3) / inputs**0.5
    x = 5 + 3 * torch.randn(layers, heads, count, inputs)
    log = 2 * silu((x - 5) / 3 @ truth).sum(-1) - 4
    samples = Samples(x.half(), (log.exp() - LEAST_NEEDED).clamp(min=0))
    model = fit_importance(samples, rotary)
    assert explained(model, samples) > 0.9
    nothing = Samples(samples.features, torch.rand(layers, heads, count))
    assert (
        explained(fit_importance(nothing, rotary), Samples(x.half(), nothing.needed.flip(2))) < 0.3
    )


class Learnt(NamedTuple):
    model: Model
    importance: ImportanceModel
    explained: float


@pytest.fixture(scope="module")
def learnt() -> Learnt:
    """Of the bundled model, from a few prompts."""
    model = load_model(BUNDLED)
    found = learn_importance(model, prompts(model, seed=1), "cpu")
    return Learnt(model, *found)


def prompts(model: Model, seed: int) -> list[list[int]]:
    tasks, suite = ["niah_multikey", "kv_lookup", "vt"], choose_suite(BUNDLED)
    cells = make_cells(model.tokenizer, tasks, [384], 3, seed=seed, suite=suite)
    return [list(prompt.ids) for cell in cells for prompt in cell.prompts]


@pytest.mark.slow
def test_prediction_ranks_tokens_by_what_their_loss_does(learnt: Learnt) -> None:
    """Rank correlation with the measured change of the attention output, in every layer.

    The change of a query's output that the loss of a token with attention a and value v brings is
    a / (1 - a) (o - v), measured for the queries of a second reading of prompts not learnt from.
    """
    assert learnt.explained > 0.5
    reader = TextReader(BUNDLED, "cpu", torch.float32)
    request = torch.tensor(learnt.model.tokenizer(REQUEST, add_special_tokens=False).input_ids)
    by_layer: list[list[float]] = [[] for _ in range(learnt.model.layers)]
    for ids in random.Random(0).sample(prompts(learnt.model, seed=2), 3):
        text = torch.tensor(ids)
        for layer, states in enumerate(read_twice(reader, text, request)):
            keys, values = (x[:, : len(ids)].transpose(0, 1) for x in (states.k, states.v))
            found = learnt.importance.predict(layer, keys, values)
            by_layer[layer].append(rank_correlation(found, damage(states, len(ids))))
    means = [sum(found) / len(found) for found in by_layer]
    print(means)
    assert min(means) > 0.5


class States(NamedTuple):
    """Of one layer: queries [Hq, N, D], keys and values [H, N, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scoring: Scoring


@torch.no_grad()
def read_twice(reader: TextReader, text: torch.Tensor, request: torch.Tensor) -> list[States]:
    found: list[States] = []
    reader._forward(torch.cat([text, request, text]), 0, lambda *x: found.append(States(*x)))
    return found


def damage(states: States, n: int) -> torch.Tensor:
    """By which squared norm the loss of each of the first n tokens changes outputs: [H, n]."""
    q, k, v, scoring = states
    scores = q.unflatten(0, (len(k), -1)) @ k[:, None].transpose(-1, -2) * scoring.scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    attention = scores.masked_fill(later, -torch.inf).softmax(-1)  # [H, G, N, N]
    out = (attention @ v[:, None])[:, :, -n:]
    attention, v = attention[:, :, -n:, :n].clamp(max=0.999), v[:, None, :n]
    apart = out.square().sum(-1)[..., None] + v.square().sum(-1)[:, :, None]
    apart = apart - 2 * out @ v.transpose(-1, -2)
    return ((attention / (1 - attention)).square() * apart).sum((1, 2))


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's, mean over heads [H, n], sinks left out."""
    both = [z[:, SINKS:].argsort(1).argsort(1).float() for z in (x, y)]
    by_head = [torch.corrcoef(torch.stack(ranks))[0, 1] for ranks in zip(*both, strict=True)]
    return float(torch.stack(by_head).mean())


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="two texts of 128 tokens are needed"):
        learn_importance(load_model(BUNDLED), [list(range(200))], "cpu")


def tiny_checkpoint(folder: Path, kind: str, **fields: Any) -> Path:
    """Of two layers of random weights, of one of transformers' kinds of models."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(kind, **shape | fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    for parameter in model.parameters():  # biases and norms, too
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


LLAMA = {"intermediate_size": 64, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "fields", "rotary"),
    [
        ("llama", LLAMA | {"num_key_value_heads": 4, "head_dim": 96}, Rotary(96)),
        ("llama", LLAMA | {"head_dim": 256, "tie_word_embeddings": True}, Rotary(256)),
        ("qwen2", LLAMA, Rotary(16)),  # biases
        ("qwen3", LLAMA | {"head_dim": 80}, Rotary(80)),  # norms of queries and keys
        ("phi", LLAMA | {"partial_rotary_factor": 0.5}, Rotary(8)),
        ("glm", LLAMA | {"head_dim": 16}, Rotary(16, True)),
        ("mistral", LLAMA | {"sliding_window": 4096}, Rotary(16)),
    ],
)
def test_models_of_many_kinds_are_read(
    kind: str, fields: dict[str, Any], rotary: Rotary, tmp_path: Path
) -> None:
    """In bf16; what their layers attend to sums to what attention must."""
    reader = TextReader(tiny_checkpoint(tmp_path, kind, **fields), "cpu", torch.float32)
    text, request = torch.randint(300, (200,)), torch.randint(300, (9,))
    assert find_rotary(reader, text) == rotary
    reads = reader.read_again(text, request)
    assert len(reads) == 2
    for read in reads:
        assert (
            read.keys.shape
            == read.values.shape
            == (fields["num_key_value_heads"], 200, *read.keys.shape[2:])
        )
        assert bool((read.needed > 0).all()) and bool((read.needed.sum(1) < 4 * 200).all())


WINDOWS = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
HYBRID = LLAMA | WINDOWS | {"num_hidden_layers": 4, "head_dim": 16}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gemma2", HYBRID | {"attn_logit_softcapping": 0.5}),
        ("gemma3_text", HYBRID),
        ("gpt_oss", HYBRID | EXPERTS),  # sinks
    ],
)
def test_windows_caps_and_sinks(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Only layers that see everything are learnt from, and all compute what the model's own do."""
    from transformers import AutoModelForCausalLM, DynamicCache

    path = tiny_checkpoint(tmp_path, kind, **fields)
    reader = TextReader(path, "cpu", torch.float32)
    text, request = torch.randint(300, (200,)), torch.randint(300, (9,))
    assert find_rotary(reader, text) == Rotary(16)
    reads = reader.read_again(text, request)
    assert len(reads) == 2
    own = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cache = DynamicCache()  # which keeps all tokens of all layers
    with torch.no_grad():
        own(torch.cat([text, request, text])[None], past_key_values=cache)
    for read, layer in zip(reads, (1, 3), strict=True):
        assert error_norm(read.keys, cache.layers[layer].keys[0, :, :200]) < 1e-5
        assert error_norm(read.values, cache.layers[layer].values[0, :, :200]) < 1e-5


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mistral", LLAMA | {"sliding_window": 100}, "all of its layers have a window"),
        ("bloom", {}, "does not go through transformers' interface"),
        ("gpt2", {}, "turned by their positions in a way that is not known"),
    ],
)
def test_models_that_cannot_be_read_are_refused(
    kind: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path, text = tiny_checkpoint(tmp_path, kind, **fields), torch.randint(300, (128,))
    with pytest.raises(ConfigError, match=message) as refused:
        find_rotary(TextReader(path, "cpu", torch.float32), text)
    assert "\n" not in str(refused.value)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama", **LLAMA)
    (path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="importance cannot be learnt"):
        TextReader(path, "cpu", torch.float32)


def test_texts_fit_the_context_and_the_model_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that a model has never seen tell nothing; a server starts next, and needs room."""
    path = tiny_checkpoint(tmp_path, "llama", **LLAMA, max_position_embeddings=400)
    lengths: list[int] = []
    models: list[weakref.ref[torch.nn.Module]] = []
    read_again = TextReader.read_again

    def watched(reader: TextReader, text: torch.Tensor, request: torch.Tensor) -> list[Read]:
        lengths.append(2 * len(text) + len(request))
        models.append(weakref.ref(reader._model))
        return read_again(reader, text, request)

    def fit(samples: Samples, rotary: Rotary) -> ImportanceModel:
        assert models[0]() is None
        return fit_importance(samples, rotary)

    monkeypatch.setattr(TextReader, "read_again", watched)
    monkeypatch.setattr(learn, "fit_importance", fit)
    monkeypatch.setattr(fit_module, "_STEPS", 5)
    tokens = [ids % 300 for ids in range(600)]
    model = load_model(BUNDLED)._replace(path=path)
    learn_importance(model._replace(tokenizer=short_words), [tokens, tokens], "cpu")
    assert len(lengths) == 2 and all(390 < length <= 400 for length in lengths)


def short_words(text: str, **options: Any) -> SimpleNamespace:
    return SimpleNamespace(input_ids=[len(word) for word in text.split()])
