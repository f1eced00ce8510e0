# SPDX-License-Identifier: Apache-2.0
"""Learning importance: what a second reading needs, pairs that RoPE turns, fits, a real model."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import silu

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.calibrate.importance.fit import (
    LEAST_NEEDED,
    Samples,
    explained,
    fit_importance,
)
from sglang_diffxkv.calibrate.importance.learn import SINKS, learn_importance
from sglang_diffxkv.calibrate.importance.reading import REQUEST, TextReader, needed
from sglang_diffxkv.calibrate.importance.rotary import rotary_of
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
    found = needed(q, keys, first, 0.3)
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
    scale: float


@torch.no_grad()
def read_twice(reader: TextReader, text: torch.Tensor, request: torch.Tensor) -> list[States]:
    found: list[States] = []
    reader._forward(torch.cat([text, request, text]), 0, lambda *x: found.append(States(*x)))
    return found


def damage(states: States, n: int) -> torch.Tensor:
    """By which squared norm the loss of each of the first n tokens changes outputs: [H, n]."""
    q, k, v, scale = states
    scores = q.unflatten(0, (len(k), -1)) @ k[:, None].transpose(-1, -2) * scale
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
