# SPDX-License-Identifier: Apache-2.0
"""Hit rates of answers: of all, and of the latest as time goes on."""

from collections.abc import Sequence
from typing import NamedTuple

from sglang_diffxkv.demo.router.workload import Answered

WINDOW = 12
"""Answers that a point of a curve is about."""


class Return(NamedTuple):
    """What happened to a replica that was killed and started again, and around it."""

    replica: str
    killed_at: float
    returned_at: float
    """When the router sent requests to it again, as `time.monotonic()` counts."""
    answers: list[Answered]
    """Of all replicas, from before it was killed to the end."""

    @property
    def before(self) -> list[Answered]:
        return [x for x in self.answers if x.replica == self.replica and x.at < self.killed_at]

    @property
    def meanwhile(self) -> list[Answered]:
        """Answers of the others while it was away."""
        return [x for x in self.answers if self.killed_at <= x.at < self.returned_at]

    @property
    def after(self) -> list[Answered]:
        return [x for x in self.answers if x.replica == self.replica and x.at >= self.returned_at]


class Point(NamedTuple):
    at: float
    hit_rate: float


def hit_rate(answers: Sequence[Answered]) -> float:
    """Share of their prompt tokens that was read from prefix caches; NaN where there are none."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    return sum(answer.cached_tokens for answer in answers) / prompt if prompt else float("nan")


def by_replica(answers: Sequence[Answered], replicas: Sequence[str]) -> dict[str, list[Answered]]:
    return {name: [x for x in answers if x.replica == name] for name in replicas}


def over_time(answers: Sequence[Answered]) -> list[Point]:
    """The hit rate of the `WINDOW` answers (at the beginning fewer) up to each."""
    ordered = sorted(answers, key=lambda answer: answer.at)
    return [
        Point(answer.at, hit_rate(ordered[max(0, end - WINDOW + 1) : end + 1]))
        for end, answer in enumerate(ordered)
    ]
