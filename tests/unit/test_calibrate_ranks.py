# SPDX-License-Identifier: Apache-2.0
"""Files of tensor-parallel ranks, from what a server of all KV heads has learnt."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_diffxkv.calibrate.ranks import Files, heads_of_rank, write_files
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.policy.importance.features import Rotary
from sglang_diffxkv.policy.importance.file import save_importance
from sglang_diffxkv.policy.methods.diffxkv import DiffXKVPolicy
from tests.support.contexts import context
from tests.support.importance import random_importance
from tests.support.policies import Shape, policy_of

WHOLE = Shape(layers=5, heads=4)
TARGET = 6.0


@pytest.mark.parametrize(
    ("ranks", "kv_heads"), [(1, 1), (1, 4), (2, 4), (4, 4), (2, 1), (8, 4), (16, 2)]
)
def test_heads_are_those_that_sglang_gives(
    ranks: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its QKVParallelLinear loads them."""
    from sglang.srt.layers import linear

    weight = torch.arange(kv_heads * 64)[:, None].expand(-1, 8).float()
    for rank in range(ranks):
        monkeypatch.setattr(linear, "get_group_rank_size", lambda group: (rank, ranks))  # noqa: B023
        layer = linear.QKVParallelLinear(
            *(8, 64, 16, kv_heads),
            bias=False,
            params_dtype=torch.float32,
            parallel_group="replicated",
        )
        layer.weight_loader(layer.weight, weight.clone(), "k")
        own = heads_of_rank(rank, ranks, kv_heads)
        assert own.stop - own.start == layer.num_kv_heads
        loaded = layer.weight[layer.num_heads * 64 :][: layer.num_kv_heads * 64]
        assert torch.equal(loaded, weight[own.start * 64 : own.stop * 64])


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A plan of all heads, as a server saves it, and its importance model."""
    files = Files.of(tmp_path_factory.mktemp("learnt") / "plan.json")
    torch.manual_seed(5)
    save_importance(random_importance(Rotary(WHOLE.dim), WHOLE), files.importance)
    config = DiffXKVConfig(
        target=TARGET, importance=str(files.importance), save_plan=str(files.plan), learn_share=1.0
    )
    policy = policy_of(config, WHOLE)
    assert isinstance(policy, DiffXKVPolicy)
    policy.key_means = torch.randn(WHOLE.layers, WHOLE.heads, WHOLE.dim)
    found = context(seed=3)
    importance = found.importance.repeat(1, 1, 2, 1) * torch.tensor([1.0, 0.1, 2.0, 0.5])[:, None]
    policy.observe(found._replace(importance=importance))
    policy.on_idle()
    policy.learner.wait()
    return files


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_rank_serves_with_files_of_its_own(learnt: Files, ranks: int, tmp_path: Path) -> None:
    mine = Files.of(tmp_path / "all.json")
    for source, target in zip(learnt, mine, strict=True):
        target.write_bytes(source.read_bytes())
    whole = policy_of(DiffXKVConfig(plan=str(mine.plan), importance=str(mine.importance)), WHOLE)
    output = Files.of(tmp_path / "plan-{rank}.json")
    model: Any = SimpleNamespace(
        layers=WHOLE.layers, kv_heads=WHOLE.heads, head_dim=WHOLE.dim, itemsize=2
    )
    write_files(mine, output, ranks, model, DiffXKVConfig(), TARGET)
    assert isinstance(whole, DiffXKVPolicy) and whole.importance is not None
    serving = DiffXKVConfig(plan=str(output.plan), importance=str(output.importance), target=TARGET)
    shape = WHOLE._replace(heads=max(1, WHOLE.heads // ranks))
    for rank in range(ranks):
        own = heads_of_rank(rank, ranks, WHOLE.heads)
        policy = policy_of(serving.of_rank(rank, ranks), shape)
        assert isinstance(policy, DiffXKVPolicy) and policy.importance is not None
        for name, tensor in policy.importance.tensors().items():
            assert torch.equal(tensor, whole.importance.tensors()[name][:, own])
        assert policy.key_means is not None and whole.key_means is not None
        assert torch.equal(policy.key_means, whole.key_means[:, own])
        assert policy.learner.plan is not None and whole.learner.plan is not None
        sketch, all_heads = policy.learner.plan.sketch, whole.learner.plan.sketch
        assert torch.equal(sketch.mass, all_heads.mass[:, own])
        found = json.loads(output.of_rank(rank).plan.read_text())
        assert found["target"] == TARGET and found["shape"]["kv_heads"] == shape.heads
    assert not list(tmp_path.glob("*.part"))
