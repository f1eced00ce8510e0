# SPDX-License-Identifier: Apache-2.0
"""The demo's lines of progress and its table."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sglang_diffxkv.demo.measure import Counters
from sglang_diffxkv.demo.workload import Score, Stage

_MIB = 2**20


class Run(NamedTuple):
    """The load on one server: what it did part by part."""

    name: str
    dense_bytes: int
    """Bytes of one token, all layers, in SGLang's own pool."""
    stages: list[Stage]

    @property
    def total(self) -> Counters:
        return Counters(*(sum(part) for part in zip(*self._counters, strict=True)))

    @property
    def score(self) -> Score:
        return Score(*(sum(part) for part in zip(*(s.score for s in self.stages), strict=True)))

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def _counters(self) -> list[Counters]:
        return [stage.counters for stage in self.stages]


def progress(stage: Stage) -> str:
    """One line on a part that has just been done."""
    score = f"{stage.score.right:>2} of {stage.score.asked:>2} answers right, "
    return (
        f"  {stage.name:<16} {stage.counters.requests:>3} requests in {stage.seconds:5.1f} s, "
        f"{score if stage.score.asked else ''}"
        f"{stage.counters.hit_rate:4.0%} of prompt tokens from cache, "
        f"{stage.held.tokens:>6,} tokens held in {stage.held.bytes_in_use / _MIB:5.1f} MiB"
    )


def table(runs: Sequence[Run]) -> str:
    """A row for each figure, a column for each run."""
    rows = [["", *(run.name for run in runs)]]
    rows += [[label, *(text(run) for run in runs)] for label, text in _ROWS]
    rows += [
        [f"  {stages[0].name}", *(f"{stage.counters.hit_rate:.1%}" for stage in stages)]
        for stages in zip(*(run.stages for run in runs), strict=True)
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(runs) + 1)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


_ROWS: Sequence[tuple[str, Callable[[Run], str]]] = (
    ("KV memory allocated, MiB", lambda run: f"{run.stages[-1].held.bytes_total / _MIB:.1f}"),
    (
        "KV memory used at the end, MiB",
        lambda run: f"{run.stages[-1].held.bytes_in_use / _MIB:.1f}",
    ),
    ("tokens held, most", lambda run: f"{max(s.held.tokens for s in run.stages):,}"),
    ("tokens held at the end", lambda run: f"{run.stages[-1].held.tokens:,}"),
    (
        "physical compression at the end",
        lambda run: f"{run.stages[-1].held.compression(run.dense_bytes):.2f}",
    ),
    (
        "answers right",
        lambda run: f"{run.score.right} of {run.score.asked}" if run.score.asked else "see below",
    ),
    ("requests done", lambda run: f"{run.total.requests}"),
    ("requests retracted", lambda run: f"{run.total.retractions}"),
    ("tokens evicted from the prefix cache", lambda run: f"{run.total.evicted_tokens:,}"),
    (
        "prompt tokens computed",
        lambda run: f"{run.total.prompt_tokens - run.total.cached_tokens:,}",
    ),
    ("seconds for the load", lambda run: f"{run.seconds:.1f}"),
    ("prefix-hit rate, whole load", lambda run: f"{run.total.hit_rate:.1%}"),
)
