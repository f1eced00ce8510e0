# SPDX-License-Identifier: Apache-2.0
"""The bench that puts policies and peers beside each other, on the bundled model."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.accuracy.real_models.__main__ import save
from bench.accuracy.real_models.claims import importance
from bench.accuracy.real_models.fixed_shares import seal_fixed
from bench.accuracy.real_models.methods import PREDICTED, Learnt, methods, tuned
from bench.accuracy.real_models.ours import ModelShape, Sealer
from bench.accuracy.real_models.protocol import TARGETS, WINDOW, Answer, Sample, measure
from bench.accuracy.real_models.reader import LayerPrefix, Prefix, Reader, States, attend
from bench.accuracy.real_models.results import OURS, Results, Row, fingerprint, load
from bench.accuracy.real_models.summary import ratio, summarize
from bench.accuracy.real_models.tuning import Calibration
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.policy.importance.features import Rotary
from sglang_diffxkv.policy.importance.file import save_importance
from sglang_diffxkv.policy.settings import ConfigError
from tests.support.importance import random_importance
from tests.support.policies import Shape

PREFILLED, AFTER = 512, 40
SINK = DiffXKVConfig().sink


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(BUNDLED)


@pytest.fixture(scope="module")
def sample() -> Sample:
    ids = torch.randint(256, (PREFILLED + AFTER,), generator=torch.Generator().manual_seed(3))
    return Sample("random", ids.tolist(), PREFILLED)


@pytest.fixture(scope="module")
def states(reader: Reader, sample: Sample) -> States:
    return reader.prefill(sample.before)


def everything(states: States) -> Prefix:
    return [LayerPrefix(*pair) for pair in zip(states.keys, states.values, strict=True)]


def test_attention_leaves_out_what_is_not_kept() -> None:
    query, keys, values = torch.randn(6, 5, 32), torch.randn(2, 37, 32), torch.randn(2, 37, 32)
    kept = torch.rand(2, 37) < 0.5
    kept[:, -5:] = True
    found = attend(query, LayerPrefix(keys, values, kept), 0.2)
    for head in range(6):
        scores = query[head].double() @ keys[head // 3].double().T * 0.2
        later = torch.arange(37) > torch.arange(32, 37)[:, None]
        weights = scores.masked_fill(later | ~kept[head // 3], -torch.inf).softmax(-1)
        exact = weights @ values[head // 3].double()
        assert (found[head] - exact).norm() / exact.norm() < 1e-5


def test_going_on_from_everything_is_one_prefill(
    reader: Reader, sample: Sample, states: States
) -> None:
    ids = torch.tensor(sample.ids)
    found = reader.log_probabilities(sample.after, PREFILLED, everything(states))
    with torch.no_grad():
        exact = reader.model(ids[None]).logits[0, PREFILLED:].log_softmax(-1)
    assert torch.allclose(found, exact, atol=1e-3)


def test_lossless_pages_are_the_prompt_in_bf16(states: States, reader: Reader) -> None:
    shape = ModelShape.of(reader.model.config)
    sealed = Sealer(DiffXKVConfig(policy="lossless"), shape).seal(states)
    for layer, (prefix, keys) in enumerate(zip(sealed.prefix, states.keys, strict=True)):
        assert prefix.kept is None
        assert torch.equal(prefix.keys[:, :-WINDOW], keys[:, :-WINDOW].bfloat16().float())
        assert torch.equal(prefix.values[:, -WINDOW:], states.values[layer, :, -WINDOW:])
    dense = shape.token_bytes * (PREFILLED - WINDOW)
    assert dense < sealed.nbytes < 1.1 * dense


def test_methods_take_the_bytes_they_are_set_for(
    reader: Reader, sample: Sample, states: States, tmp_path: Path
) -> None:
    shape = ModelShape.of(reader.model.config)
    path = tmp_path / "importance.safetensors"
    own = Shape(shape.layers, shape.kv_heads, shape.head_dim)
    save_importance(random_importance(Rotary(shape.head_dim), own), path)
    full = reader.log_probabilities(sample.after, PREFILLED, everything(states))
    diffkv = tuned(Calibration(shape, [states]))
    assert set(diffkv) == set(TARGETS)
    for method in methods(shape, sample.compressed, Learnt(diffkv, path)):
        sealed = Sealer(method.config, shape).seal(states, method.config.window)
        found = reader.log_probabilities(sample.after, PREFILLED, sealed.prefix)
        answer = measure(full, found, sample, sealed.nbytes)
        compression = sample.compressed * shape.token_bytes / answer.nbytes
        assert answer.kl > -1e-6, method
        if method.name in ("diffxkv", PREDICTED, "diffkv") and method.target is not None:
            assert method.target * 0.97 < compression < method.target * 1.05, method
        elif method.target is not None:
            assert compression > method.target * 0.97, method


def test_knobs_are_searched_for_a_compression(reader: Reader, states: States) -> None:
    """Alphas in the paper's ratio; and a target that is beyond them is refused."""
    calibration = Calibration(ModelShape.of(reader.model.config), [states])
    config = DiffXKVConfig(policy="diffkv")
    alphas = [calibration.with_alphas(config, target) for target in (3.0, 5.0, 8.0)]
    for found, target in zip(alphas, (3.0, 5.0, 8.0), strict=True):
        assert found.alpha_low == pytest.approx(min(1, 0.02 * found.alpha_high))
        assert target <= calibration.compression(found) < 1.03 * target
        assert replace(found, alpha_high=1.0, alpha_low=0.02) == config
    assert alphas[0].alpha_high < alphas[1].alpha_high < alphas[2].alpha_high
    capped = calibration.with_caps(config, 5.0)
    assert 5.0 <= calibration.compression(capped) < 1.05 * 5.0
    with pytest.raises(ConfigError, match="'diffkv' cannot reach a compression of 1000"):
        calibration.with_alphas(config, 1000.0)


def test_fixed_shares_give_each_head_the_same_at_the_bytes_of_thresholds(
    reader: Reader, states: States
) -> None:
    shape = ModelShape.of(reader.model.config)
    dynamic = Sealer(DiffXKVConfig(policy="diffkv", alpha_high=1.5, alpha_low=0.4), shape)
    expected, found = dynamic.seal(states), seal_fixed(dynamic, states)
    assert found.nbytes == pytest.approx(expected.nbytes, rel=0.03)
    kept = torch.stack([layer.kept[:, :-WINDOW].sum(-1) for layer in found.prefix])
    assert bool((kept == kept[0, 0]).all()), "every head keeps as many"
    assert float(kept[0, 0]) / (PREFILLED - WINDOW) == pytest.approx(found.high + found.low)
    assert (found.high, found.low) == pytest.approx((expected.high, expected.low), abs=0.002)
    mass = importance(states)[..., : PREFILLED - WINDOW]
    for layer, held in enumerate(found.prefix):
        assert bool(held.kept[:, :SINK].all())
        rest = held.kept[:, SINK:-WINDOW], mass[layer, :, SINK:]
        ours = rest[1].masked_fill(~rest[0], 0).sum() / rest[0].sum()
        assert ours > rest[1].mean(), "what it keeps is looked at more"


def test_answers_outlive_a_run_unless_the_question_changes(tmp_path: Path) -> None:
    samples = [Sample(name, list(range(10)), 5) for name in "ab"]
    asked = {sample.name: fingerprint("model", sample) for sample in samples}
    results = Results(asked, 8, {"a": 5, "b": 5})
    for name in "ab":
        results.add(OURS, "method", 4.0, name, Answer(0.1, 0.2, 2.0, 0.9, 100.0))
    file = tmp_path / "results.json"
    save(results, file)
    changed = asked | {"b": fingerprint("model", samples[1]._replace(prefilled=4))}
    (row,) = load(file, Results(changed, 8, {"a": 5, "b": 4})).rows
    assert row == Row(OURS, "method", 4.0, {"a": results.rows[0].answers["a"]})


def test_summaries_weigh_documents_by_their_bytes() -> None:
    answers = {"a": Answer(0.1, 0.2, 1.0, 0.9, 100.0), "b": Answer(0.3, 0.4, 3.0, 0.7, 300.0)}
    row = Row(OURS, "method", None, answers)
    results = Results({}, 16, {"a": 50, "b": 150}, rows=[row])
    found = summarize(results, row)
    assert found.compression == 16 * 200 / 400
    assert found.with_window == 16 * (200 + 2 * WINDOW) / (400 + 16 * 2 * WINDOW)
    assert found.kl.value == pytest.approx(0.2) and found.kl.low == pytest.approx(0.1)
    assert found.perplexity.value == pytest.approx(math.e**2)
    assert ratio(row, row) == pytest.approx((1, 1, 1))
