# SPDX-License-Identifier: Apache-2.0
"""The router demo's pictures: hit rates of each replica over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_diffxkv.demo.router.measure import WINDOW, Return, by_replica, hit_rate, over_time
from sglang_diffxkv.demo.router.workload import Answered

_STYLES = ("C0o-", "C1s-", "C2^-", "C3D-")


def draw_policies(
    runs: Mapping[str, Sequence[Answered]], replicas: Sequence[str], file: Path
) -> None:
    """A panel for each policy's run of the same load."""
    figure, panels = _panels(len(runs))
    for panel, (policy, given) in zip(panels, runs.items(), strict=True):
        answers = _from_zero(given, _begin(given))
        for style, (name, own) in zip(_STYLES, by_replica(answers, replicas).items(), strict=False):
            _curve(panel, style, name, [own])
        panel.set_title(f"{policy}: {hit_rate(answers):.0%} of {len(answers)} requests' tokens")
        panel.legend(loc="lower right", fontsize="small")
    figure.savefig(file, dpi=100)


def draw_return(found: Return, replicas: Sequence[str], file: Path) -> None:
    """One panel: a replica is killed, and comes back."""
    figure, (panel,) = _panels(1)
    begin = _begin(found.answers)
    parts = by_replica(_from_zero(found.answers, begin), replicas)
    for style, (name, own) in zip(_STYLES, parts.items(), strict=False):
        again = found.returned_at - begin if name == found.replica else float("inf")
        before, after = ([x for x in own if (x.at >= again) == late] for late in (False, True))
        _curve(panel, style, name, [before, after])
    for when, what in ((found.killed_at, "killed"), (found.returned_at, "back")):
        panel.axvline(when - begin, color="black", linestyle="--", linewidth=1)
        panel.annotate(f" {what}", (when - begin, 1.02), fontsize="small")
    panel.legend(loc="lower right", fontsize="small")
    panel.set_title(f"{found.replica} is killed and comes back")
    figure.savefig(file, dpi=100)


def _begin(answers: Sequence[Answered]) -> float:
    """When the first request was sent."""
    return min(answer.at - answer.seconds for answer in answers)


def _from_zero(answers: Sequence[Answered], begin: float) -> list[Answered]:
    return [answer._replace(at=answer.at - begin) for answer in answers]


def _panels(count: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * count, 4), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set(xlabel="seconds", ylim=(-0.02, 1.1))
    panels[0].set_ylabel(f"prefix-hit rate of the latest {WINDOW} requests")
    return figure, panels


def _curve(panel: Any, style: str, name: str, parts: Sequence[Sequence[Answered]]) -> None:
    """Of one replica, broken between `parts`, each of which its cache began anew."""
    requests = sum(map(len, parts))
    for number, part in enumerate(parts):
        points = over_time(part)
        panel.plot(
            [point.at for point in points],
            [point.hit_rate for point in points],
            style,
            markersize=3,
            label="_nolegend_" if number else f"{name} ({requests} requests)",
        )
