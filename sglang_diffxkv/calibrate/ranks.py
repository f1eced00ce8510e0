# SPDX-License-Identifier: Apache-2.0
"""What a server of all KV heads has learnt, as the files of tensor-parallel ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.eval.model import Model
from sglang_diffxkv.kernels.layout import PageLayout, make_layout
from sglang_diffxkv.policy.budgeting.learner import RANK, high_layers
from sglang_diffxkv.policy.budgeting.plan import Shape, load_plan, solve_plan
from sglang_diffxkv.policy.importance.file import load_importance, save_importance


class Files(NamedTuple):
    """A plan, and the importance model beside it."""

    plan: Path
    importance: Path

    @classmethod
    def of(cls, plan: Path) -> Self:
        """Those of `calibrate --output`."""
        stem = plan.name.removesuffix(".json")
        return cls(plan, plan.with_name(f"{stem}.importance.safetensors"))

    def of_rank(self, rank: int) -> Files:
        """Those of a rank, by the `RANK` in their names."""
        return Files(*(path.with_name(path.name.replace(RANK, str(rank))) for path in self))


def check_output(output: Path, ranks: int, kv_heads: int) -> None:
    """
    Raises:
        ConfigError: there is nowhere to write it, or a model of so many KV heads cannot be served
            by so many ranks.
    """
    if not output.name or output.is_dir():
        raise ConfigError(f"--output {output} is a folder: give a file, such as plan.json")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {output}: there is no folder {output.parent} to write to")
    if ranks < 1 or (kv_heads % ranks and ranks % kv_heads):
        raise ConfigError(
            f"--ranks {ranks} is not allowed; expected a divisor or a multiple of the model's "
            f"{kv_heads} KV heads"
        )
    if ranks > 1 and RANK not in output.name:
        raise ConfigError(
            f"--output {output} is not allowed with {ranks} ranks, each of which gets a file of "
            f"its own; put {RANK} into its name, such as 'plan-{RANK}.json'"
        )


def heads_of_rank(rank: int, ranks: int, kv_heads: int) -> slice:
    """The KV heads that SGLang gives to a rank: one, where several ranks have the same."""
    if ranks > kv_heads:
        head = rank // (ranks // kv_heads)
        return slice(head, head + 1)
    own = kv_heads // ranks
    return slice(rank * own, (rank + 1) * own)


def write_files(
    learnt: Files, output: Files, ranks: int, model: Model, config: DiffXKVConfig, target: float
) -> None:
    """Write what was learnt, by ``config`` and for a target, for each of the ranks.

    Every file in one step: those of an earlier run stay whole, whatever happens.
    """
    if ranks == 1:
        for source, path in zip(learnt, output.of_rank(0), strict=True):
            source.replace(path)
        return
    whole = _layout(model, model.kv_heads, config)
    importance, digest = load_importance(learnt.importance, whole, model.layers)
    number, sketch, key_means = load_plan(learnt.plan, Shape.of(whole, model.layers), digest)
    for rank in range(ranks):
        heads, files = heads_of_rank(rank, ranks, model.kv_heads), output.of_rank(rank)
        layout = _layout(model, heads.stop - heads.start, config)
        save_importance(importance.of_heads(heads), files.importance)
        own = load_importance(files.importance, layout, model.layers).sha256
        plan = solve_plan(
            number,
            target,
            sketch.of_heads(heads),
            layout,
            high_layers(config, model.layers),
            importance=own,
        )
        replace(plan, key_means=None if key_means is None else key_means[:, heads]).save(files.plan)


def _layout(model: Model, kv_heads: int, config: DiffXKVConfig) -> PageLayout:
    high, low = config.tiers.formats
    return make_layout(
        head_dim=model.head_dim,
        num_kv_heads=kv_heads,
        raw_itemsize=model.itemsize,
        high=high,
        low=low,
    )
