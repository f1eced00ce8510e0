# SPDX-License-Identifier: Apache-2.0
"""Importance models: features, prediction, files, and what policies make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import silu

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.kernels.layout import (
    FORMATS,
    HIGH,
    LOW,
    PAGE_TOKENS,
    PRUNED,
    encode_importance,
    make_layout,
    measure,
)
from sglang_diffxkv.policy.base import SEEN
from sglang_diffxkv.policy.budgeting.plan import solve_plan
from sglang_diffxkv.policy.budgeting.sketch import ImportanceSketch
from sglang_diffxkv.policy.budgeting.target import (
    PRIOR,
    Target,
    divisors,
    low_utility,
    prior_of,
    raw_page_bytes,
)
from sglang_diffxkv.policy.importance.features import Rotary, feature_count, features
from sglang_diffxkv.policy.importance.file import load_importance, save_importance
from sglang_diffxkv.policy.importance.model import MOST_LOG, ImportanceModel
from sglang_diffxkv.policy.methods.diffxkv import DiffXKVPolicy
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.registry import make_policy
from sglang_diffxkv.pool.demotion import read_tokens
from sglang_diffxkv.pool.sealing import seal, seal_context
from tests.support.builders import error_norm
from tests.support.contexts import PAGES, SHAPE, context
from tests.support.demotion import fill
from tests.support.importance import random_importance
from tests.support.pages import write
from tests.support.policies import Shape, policy_of
from tests.support.rotary import turned
from tests.support.stores import STORE, make_store

OWN = Shape(layers=3, heads=2, dim=48)
LAYERS, HEADS, DIM, _ = OWN
LAYOUT = make_layout(
    head_dim=DIM, num_kv_heads=HEADS, raw_itemsize=2, high=FORMATS["K8V4"], low=FORMATS["K4V2"]
)


ROTARIES = [Rotary(DIM), Rotary(DIM, True), Rotary(DIM // 2), Rotary(12, True), Rotary(0)]


def test_pairs_are_those_of_halves_or_of_neighbours() -> None:
    """As SGLang's and transformers' rotary embeddings have them, `is_neox_style` or not."""
    keys = torch.arange(6.0)
    halves, neighbours = Rotary(4).pairs(keys), Rotary(4, True).pairs(keys)
    assert [x.tolist() for x in halves] == [[0, 1], [2, 3]]
    assert [x.tolist() for x in neighbours] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("rotary", ROTARIES)
def test_features_do_not_depend_on_the_position(rotary: Rotary) -> None:
    keys, values = torch.randn(2, 7, DIM, dtype=torch.float64)
    here = features(keys, values, rotary)
    there = features(turned(keys, rotary, 1234.0), values, rotary)
    assert here.shape == (7, feature_count(DIM, rotary))
    assert error_norm(there, here) < 1e-5


@pytest.mark.parametrize("rotary", ROTARIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prediction_is_that_of_each_token_alone(rotary: Rotary, dtype: torch.dtype) -> None:
    model = random_importance(rotary, OWN)
    keys, values = torch.randn(2, 4, 64, HEADS, DIM).to(dtype)
    keys[2, 5, 1, 3] = torch.nan
    keys[2, 6, 1, :3], values[2, 7, 1, 9], values[2, 8, 1, 4] = torch.inf, torch.inf, -torch.inf
    found = model.predict(1, keys, values)
    assert found.shape == (4, HEADS, 64) and found.dtype == torch.float32
    for page, token, head in ((0, 0, 0), (1, 63, 1), (3, 17, 0)):
        key, value = (x[page, token, head].double() for x in (keys, values))
        first, second = rotary.pairs(key)
        x = torch.cat([(first**2 + second**2).log(), key[rotary.dims :], value])
        hidden = x @ model.weight[1, head].double() + model.bias[1, head].double()
        log = hidden[-1] + silu(hidden[:-1]) @ model.output[1, head].double()
        assert float(found[page, head, token]) == pytest.approx(
            float(log.clamp(max=MOST_LOG).exp()), rel=1e-4
        )
    assert bool(found[2, 1, 5:9].isnan().all()) and int(found.isnan().sum()) == 4


def test_file_round_trip(tmp_path: Path) -> None:
    model, path = random_importance(Rotary(24, True), OWN), tmp_path / "model.safetensors"
    save_importance(model, path)
    found, digest = load_importance(path, LAYOUT, LAYERS)
    assert found.rotary == model.rotary and len(digest) == 64
    assert all(torch.equal(found.tensors()[k], v) for k, v in model.tensors().items())
    assert found.nbytes == sum(x.nbytes for x in model.tensors().values())
    mine = found.of_heads(slice(1, 2))
    assert mine.weight.shape[1] == 1 and torch.equal(mine.bias[:, 0], model.bias[:, 1])
    assert not list(tmp_path.glob("*.part"))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ConfigError, match="No such file"):
        load_importance(path, LAYOUT, LAYERS)
    path.write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="not a file that `sglang-diffxkv calibrate` writes"):
        load_importance(path, LAYOUT, LAYERS)
    model = random_importance(Rotary(DIM), OWN)
    about = {"format": "1", "rotary_dims": str(DIM), "interleaved": "0"}
    for wrong, message in (
        ({"bias": model.bias[:1]}, "not a file that"),
        ({"output": model.output.log()}, "not a file that"),
        ({"more": torch.zeros(1)}, "not a file that"),
    ):
        save_file(model.tensors() | wrong, path, about)
        with pytest.raises(ConfigError, match=message):
            load_importance(path, LAYOUT, LAYERS)
    save_file(model.tensors(), path, about | {"format": "0"})
    with pytest.raises(ConfigError, match="format 0, expected 1: calibrate again"):
        load_importance(path, LAYOUT, LAYERS)
    save_importance(random_importance(Rotary(DIM), OWN._replace(heads=3)), path)
    with pytest.raises(ConfigError, match="3 layers of 3 KV heads, this model has 3 of 2 of 48"):
        load_importance(path, LAYOUT, LAYERS)


def test_policies_without_a_use_for_it_refuse_it(tmp_path: Path) -> None:
    config = DiffXKVConfig(policy="uniform", importance=str(tmp_path / "x"))
    with pytest.raises(ConfigError, match="no use for 'importance'"):
        make_policy(config, head_dim=DIM, num_kv_heads=HEADS, raw_itemsize=2, num_layers=LAYERS)


def predicting(folder: Path, shape: Shape, **fields: Any) -> dict[str, Any]:
    """Fields of a configuration with a random importance model for this shape."""
    torch.manual_seed(3)
    path = folder / "importance.safetensors"
    save_importance(random_importance(Rotary(shape.dim), shape), path)
    return {"importance": str(path)} | fields


def test_pages_are_sealed_by_what_is_predicted_and_seen(tmp_path: Path) -> None:
    fields = predicting(tmp_path, STORE, target=8.0)
    store, plain = (make_store("diffxkv", 24 << 20, **f) for f in (fields, {"target": 8.0}))
    pages, length = torch.arange(1, 8), 7 * PAGE_TOKENS + 70
    assert store.nbytes > plain.nbytes and store.sizes.frames <= plain.sizes.frames
    for s in (store, plain):
        fill(s, pages)
        write(s, pages, torch.arange(7), torch.full((7,), length))
        s.raw.counts[s.directory.raw_slot[pages[2:4]].long()] = 0  # nobody has scored them
    model = store.policy.importance
    assert isinstance(model, ImportanceModel)
    slots = store.directory.raw_slot[pages].long()
    found, seen = seal_context(store, pages, slots, None), seal_context(plain, pages, slots, None)
    predicted = torch.stack(
        [
            model.predict(i, keys[slots], values[slots])
            for i, (keys, values) in enumerate(zip(store.raw.keys, store.raw.values, strict=True))
        ],
        1,
    )
    expected = predicted.double() / length + SEEN * seen.importance.double().square()
    assert error_norm(found.importance, expected) < 1e-6
    assert bool((found.count > 0).all()) and bool((seen.count[2:4] == 0).all())
    seal(store, pages, torch.zeros(7))
    tokens = [read_tokens(store, layer, pages) for layer in range(STORE.layers)]
    tiers = torch.stack([t.tiers for t in tokens], 1)
    # All layers' tokens compete by one measure; a token that matters more is in no lower tier.
    matters = (found.importance * length).masked_fill(
        store.policy.protected(found)[:, None, None], 9e9
    )
    least = [float(matters[tiers == tier].min()) for tier in (LOW, HIGH)]
    most = [float(matters[tiers == tier].max()) for tier in (PRUNED, LOW)]
    assert most[0] <= least[0] and most[1] <= least[1]
    codes = torch.stack([t.codes for t in tokens], 1)
    assert torch.equal(
        codes[tiers > 0], encode_importance(found.importance).clamp(min=1)[tiers > 0]
    )


@pytest.mark.parametrize("target", [0.9, 0.99, 4.0, 8.0])
def test_targets_are_met_over_all_layers(tmp_path: Path, target: float) -> None:
    """Lone pages follow the plan, which was solved for all layers together."""
    policy = policy_of(DiffXKVConfig(**predicting(tmp_path, SHAPE, target=target)), SHAPE)
    assert isinstance(policy, DiffXKVPolicy)
    contexts = [context(seed=seed) for seed in range(8)]
    for ctx in contexts:
        policy.observe(ctx)
    policy.learner.wait()
    kept, whole, nbytes = 0.0, 0.0, 0
    for ctx in contexts:
        for asked in (ctx, ctx._replace(sequence=None)):
            tiers = policy.assign(asked)
            weight = ctx.importance * ~policy.protected(ctx)[:, None, None]
            utility = (tiers == HIGH) + (tiers == LOW) * low_utility(
                *policy.config.tiers.formats, True
            )
            kept, whole = kept + float((weight * utility).sum()), whole + float(weight.sum())
            frames = -(-measure(tiers, policy.layout).nbytes // policy.layout.frame_bytes)
            nbytes += int(frames.sum()) * policy.layout.frame_bytes
    if target < 1:
        assert kept / whole == pytest.approx(target, abs=0.01)
    else:
        raw = 2 * len(contexts) * PAGES * raw_page_bytes(policy.layout, SHAPE.layers)
        assert raw / nbytes == pytest.approx(target, rel=0.06)


def test_nothing_is_added_to_what_is_predicted() -> None:
    balanced = Target.of(6.0)
    assert prior_of(balanced, False) == PRIOR and prior_of(balanced, True) == 0
    shares = divisors(torch.tensor([1.0, 2.0, 0.0]).double(), False).tolist()
    assert shares[:2] == [1, 2] and shares[2] > 0
    assert divisors(torch.tensor([1.0, 2.0, 3.0]).double(), True).tolist() == [2, 2, 2]


def test_predicted_damage_has_one_threshold_for_all_layers() -> None:
    """A layer's own share of importance would make its tokens matter as much as any other's."""
    layout = policy_of(DiffXKVConfig(), SHAPE).layout
    sketch = ImportanceSketch.empty(SHAPE.layers, SHAPE.heads, "cpu")
    ctx = context()
    scale = 4.0 ** torch.arange(SHAPE.layers)[:, None, None]
    sketch.update(ctx.importance * ctx.context[:, None, None, None] * scale, ctx.count > 0)
    for target in (0.9, 8.0):
        plans = (solve_plan(1, target, sketch, layout, importance=sha) for sha in ("x", None))
        alphas = [plan.qualities[Quality.BALANCED].alpha_low for plan in plans]
        assert [len(set(by_layer)) for by_layer in alphas] == [1, SHAPE.layers]


def test_a_plan_belongs_to_the_importance_it_was_learnt_with(tmp_path: Path) -> None:
    fields, path = predicting(tmp_path, SHAPE), tmp_path / "plan.json"
    policy = policy_of(DiffXKVConfig(**fields, save_plan=str(path)), SHAPE)
    assert isinstance(policy, DiffXKVPolicy)
    policy.observe(context())
    policy.on_idle()
    policy.learner.wait()
    again = policy_of(DiffXKVConfig(**fields, plan=str(path)), SHAPE)
    assert again.plan_number == 1
    with pytest.raises(ConfigError, match="with another importance model"):
        policy_of(DiffXKVConfig(plan=str(path)), SHAPE)
    save_importance(random_importance(Rotary(0), SHAPE), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="with another importance model"):
        other = str(tmp_path / "other.safetensors")
        policy_of(DiffXKVConfig(plan=str(path), importance=other), SHAPE)


def test_numbers_that_are_none_are_kept(tmp_path: Path) -> None:
    """A NaN counts as high, and spoils nothing for others."""
    store = make_store("diffxkv", 24 << 20, **predicting(tmp_path, STORE, target=8.0))
    pages = torch.arange(1, 5)
    fill(store, pages)
    write(store, pages, torch.arange(4), torch.full((4,), 400))
    slots = store.directory.raw_slot[pages].long()
    store.raw.values[1][slots[2], 40, 0, 5] = torch.nan
    seal(store, pages, torch.zeros(4))
    tiers = read_tokens(store, 1, pages).tiers
    assert tiers[2, 0, 40] == HIGH and bool((tiers == PRUNED).any())
