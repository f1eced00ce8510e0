# SPDX-License-Identifier: Apache-2.0
"""Learns plans from traffic: sketches a sample of it, and solves again when it has drifted."""

from __future__ import annotations

import logging
import random
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.policy.plan import Plan, Shape, load_sketch, solve_plan
from sglang_diffxkv.policy.sketch import ImportanceSketch

log = logging.getLogger(__name__)

FIRST_PLAN_PAGES = 64
"""Sketched before there is a plan; until then every sealed page is."""
CHECK_PAGES = 16
"""Sketched between two looks at the drift."""
DRIFT = 0.1
"""Share of importance that lies elsewhere than when the plan was solved."""


class PlanLearner:
    """The current plan, and what the next one will be solved from.

    Solving runs in a thread of its own; `plan` changes in one assignment, between two batches that
    are sealed or within one, which does no harm: a batch reads it once.
    """

    def __init__(
        self, config: DiffXKVConfig, target: float, layout: PageLayout, num_layers: int
    ) -> None:
        """
        Raises:
            ConfigError: the plan file is missing, broken or of another model.
        """
        self._config, self._target, self._layout = config, target, layout
        self._num_layers = num_layers
        self._sketch: ImportanceSketch | None = None
        self._coin = random.Random(0)
        self._since_check = 0
        self.pages_since = 0
        """Sketched since the plan was solved."""
        self._solving: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self.plan: Plan | None = None
        if config.plan is not None:
            number, found = load_sketch(Path(config.plan), Shape.of(layout, num_layers))
            self.plan = self._solve(number, found)
            self._sketch = found.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the sketch on the device."""
        return ImportanceSketch(self._num_layers, self._layout.num_kv_heads, "meta").nbytes

    def observe(self, importance: torch.Tensor, counted: torch.Tensor) -> None:
        """Take pages into the sketch, if the coin says so; arguments as for its `update`."""
        share = self._config.learn_share
        if share == 0 or (self.plan is not None and self._coin.random() >= share):
            return
        if self._sketch is None:
            self._sketch = ImportanceSketch(
                self._num_layers, self._layout.num_kv_heads, importance.device
            )
        if self._sketch.tokens.device != importance.device:
            self._sketch.to(importance.device)
        self._sketch.update(importance, counted)
        pages = counted.numel() // PAGE_TOKENS
        self._since_check += pages
        self.pages_since += pages
        enough = CHECK_PAGES if self.plan is not None else FIRST_PLAN_PAGES
        if self._since_check >= enough:
            self._start(only_if_drifted=True)

    def on_idle(self) -> None:
        """Where plans are saved, a server at rest has saved what it knows."""
        if self._config.save_plan is not None and self.pages_since:
            self._start(only_if_drifted=False)

    def wait(self) -> None:
        """Until the plan that is being solved is there.

        Raises:
            Exception: whatever solving or saving raised.
        """
        if self._solving is not None:
            self._solving.result()

    def _start(self, *, only_if_drifted: bool) -> None:
        if self._sketch is None or (self._solving is not None and not self._solving.done()):
            return
        self._since_check = 0
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="diffxkv-plan")
        self._solving = self._thread.submit(self._update, self._sketch.copy(), only_if_drifted)

    def _update(self, sketch: ImportanceSketch, only_if_drifted: bool) -> None:
        plan = self.plan
        if plan and only_if_drifted and sketch.difference(plan.sketch) < DRIFT:
            return
        try:
            self.pages_since = 0
            new = self._solve(plan.number + 1 if plan else 1, sketch)
            if self._config.save_plan is not None:
                new.save(Path(self._config.save_plan).expanduser())
            self.plan = new
        except Exception:
            log.exception("diffxkv: no new plan; the old one stays")
            raise

    def _solve(self, number: int, sketch: ImportanceSketch) -> Plan:
        return solve_plan(
            number, self._target, sketch, self._layout, high_layers(self._config, self._num_layers)
        )


def high_layers(config: DiffXKVConfig, num_layers: int) -> tuple[int, ...]:
    """Numbers from 0 of the layers that stay high; negative ones count from the last.

    Raises:
        ConfigError: the model has no such layer.
    """
    for layer in config.high_layers:
        if not -num_layers <= layer < num_layers:
            raise ConfigError(
                f"high_layers has {layer}, but the model has {num_layers} layers: give numbers "
                f"from {-num_layers} to {num_layers - 1}"
            )
    return tuple(sorted({layer % num_layers for layer in config.high_layers}))
