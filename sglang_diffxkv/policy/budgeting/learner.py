# SPDX-License-Identifier: Apache-2.0
"""Learns plans from traffic: sketches a sample of it, and solves again when it has drifted."""

import logging
import random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.policy.budgeting.plan import Plan, Shape, load_plan, solve_plan
from sglang_diffxkv.policy.budgeting.sketch import ImportanceSketch
from sglang_diffxkv.policy.budgeting.target import TargetSettings
from sglang_diffxkv.policy.importance.file import load_importance
from sglang_diffxkv.policy.importance.model import ImportanceModel
from sglang_diffxkv.policy.settings import CHECKED, Allowed, ConfigError

log = logging.getLogger(__name__)

FIRST_PLAN_PAGES = 64
"""Sketched before there is a plan; until then every sealed page is."""
CHECK_PAGES = 16
"""Sketched between two looks at the drift."""
DRIFT = 0.1
"""Share of importance that lies elsewhere than when the plan was solved."""

RANK = "{rank}"
"""In paths of plans: the number of the tensor-parallel rank, from 0."""


@dataclass(frozen=True, config=CHECKED)
class PlanSettings(TargetSettings):
    """Settings of a policy whose target is met by plans."""

    plan: Annotated[
        str | None, Allowed("the path of a plan that `sglang-diffxkv calibrate` wrote, or null")
    ] = None
    """path of a plan that `sglang-diffxkv calibrate` or `save_plan` wrote; `null`: one is learnt
    from traffic. With several ranks it needs `{rank}` in it, as in `plan-{rank}.json`: each has a
    plan of its own KV heads"""
    importance: Annotated[
        str | None,
        Allowed("the path of an importance model that `sglang-diffxkv calibrate` wrote, or null"),
    ] = None
    """path of an importance model that `sglang-diffxkv calibrate` wrote: what a token matters is
    predicted from its key and value, not only seen from the questions that were asked. `null`: seen
    only. With several ranks with `{rank}` in it"""
    save_plan: Annotated[str | None, Allowed("a path to write plans to, or null")] = None
    """path to which plans are written when they are solved, and when the server is idle; with
    several ranks with `{rank}` in it"""
    learn_share: Annotated[float, Field(ge=0, le=1), Allowed("a share from 0 to 1")] = 0.1
    """share of sealed batches that plans are learnt from; `0` keeps the `plan` as it is"""
    high_layers: Annotated[
        tuple[int, ...],
        Allowed("a list of layers that stay high, negative from the last, such as [0]"),
    ] = ()
    """layers whose tokens all stay high, negative numbers from the last"""

    def of_rank(self, rank: int, ranks: int) -> Self:
        """The settings of one of several tensor-parallel ranks.

        Raises:
            ConfigError: they would share the file of a plan, which is of a rank's own KV heads.
        """
        paths = {key: getattr(self, key) for key in ("plan", "importance", "save_plan")}
        for key, path in paths.items():
            if ranks > 1 and path is not None and RANK not in path:
                raise ConfigError(
                    f"{key} = {path!r} is not allowed with {ranks} ranks, each of which has files "
                    f"of its own KV heads; put {RANK} into it, such as 'plan-{RANK}.json'"
                )
        own = {key: path and path.replace(RANK, str(rank)) for key, path in paths.items()}
        return replace(self, **own)


class PlanLearner:
    """The current plan, and what the next one will be solved from.

    Solving runs in a thread of its own. Its result is taken over in `observe` and `on_idle` only,
    so that the plan does not change while pages are graded.
    """

    def __init__(
        self, config: PlanSettings, target: float, layout: PageLayout, num_layers: int
    ) -> None:
        """
        Raises:
            ConfigError: a file is missing, broken or of another model.
        """
        self._config, self._target, self._layout = config, target, layout
        self._num_layers = num_layers
        self._high_layers = high_layers(config, num_layers)
        self._sketch: ImportanceSketch | None = None
        self._coin = random.Random(0)
        self._since_check = 0
        self._solving: Future[Plan] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self.unsaved_pages = 0
        """Sketched since the plan was written to `save_plan`."""
        self._saving = 0
        """Of these, those that are being written."""
        self.key_means: torch.Tensor | None = None
        """`TierPolicy.key_means`, which are saved with plans."""
        self.plan: Plan | None = None
        self.importance: ImportanceModel | None = None
        """Predicts what is sketched."""
        self._sha256: str | None = None
        if config.importance is not None:
            path = Path(config.importance)
            self.importance, self._sha256 = load_importance(path, layout, num_layers)
        if config.plan is not None:
            shape = Shape.of(layout, num_layers)
            saved = load_plan(Path(config.plan), shape, self._sha256)
            self.key_means = saved.key_means
            self.plan = self._solve(saved.number, saved.sketch)
            self._sketch = saved.sketch.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the sketch on the device."""
        return ImportanceSketch.nbytes_of(self._num_layers, self._layout.num_kv_heads)

    def wants_pages(self) -> bool:
        """Whether the pages that are about to be sealed belong to the sample."""
        share = self._config.learn_share
        return share > 0 and (self.plan is None or self._coin.random() < share)

    def observe(self, importance: torch.Tensor, counted: torch.Tensor) -> None:
        """Take pages into the sketch; arguments as for its `update`."""
        if self._sketch is None:
            shape = (self._num_layers, self._layout.num_kv_heads)
            self._sketch = ImportanceSketch.empty(*shape, importance.device)
        self._sketch.to(importance.device)
        self._sketch.update(importance, counted)
        pages = counted.numel() // PAGE_TOKENS
        self._since_check += pages
        self.unsaved_pages += pages
        enough = CHECK_PAGES if self.plan is not None else FIRST_PLAN_PAGES
        if self._since_check >= enough and self._start():
            self._since_check = 0

    def take_over(self) -> None:
        """Use the plan that has been solved, if there is one."""
        if self._solving is None or not self._solving.done():
            return
        solved, self._solving = self._solving, None
        self.unsaved_pages -= self._saving
        self._saving = 0
        try:
            plan = solved.result()
        except Exception:
            log.exception("diffxkv: no new plan; the old one stays")
            return
        if self.plan is None or plan.number > self.plan.number:
            self.plan = plan

    def on_idle(self) -> None:
        """Where plans are saved, a server at rest begins to save what it knows."""
        self.take_over()
        if self._config.save_plan is not None and self.unsaved_pages and self._start(saves=True):
            self._saving = self.unsaved_pages

    def wait(self) -> None:
        """Until the plan that is being solved is there, and used."""
        if self._solving is not None:
            self._solving.exception()
        self.take_over()

    def _start(self, *, saves: bool = False) -> bool:
        """Begin to solve the next plan, and to save it, unless one is being solved."""
        if self._sketch is None or self._solving is not None:
            return False
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="diffxkv-plan")
        work = self._next_and_save if saves else self._next_plan
        taken, plan = self._sketch.taken(), self.plan
        self._solving = self._thread.submit(lambda: work(taken(), plan))
        return True

    def _next_and_save(self, sketch: ImportanceSketch, plan: Plan | None) -> Plan:
        assert self._config.save_plan is not None
        plan = self._next_plan(sketch, plan)
        path = Path(self._config.save_plan).expanduser()
        try:
            # Of all that is known, also where that is no reason for another plan.
            self._solve(plan.number, sketch).save(path)
        except OSError as error:
            log.error("diffxkv: the plan cannot be written to %s: %s", path, error)
        return plan

    def _next_plan(self, sketch: ImportanceSketch, plan: Plan | None) -> Plan:
        """A new plan if traffic has drifted, else the old one."""
        if plan is None:
            return self._solve(1, sketch)
        if sketch.difference(plan.sketch) < DRIFT:
            return plan
        return self._solve(plan.number + 1, sketch)

    def _solve(self, number: int, sketch: ImportanceSketch) -> Plan:
        plan = solve_plan(
            number, self._target, sketch, self._layout, self._high_layers, self._sha256
        )
        return replace(plan, key_means=self.key_means)


def high_layers(config: PlanSettings, num_layers: int) -> tuple[int, ...]:
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
