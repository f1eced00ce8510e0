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
    for panel, (policy, answers) in zip(panels, runs.items(), strict=True):
        _curves(panel, answers, replicas, min(x.at - x.seconds for x in answers))
        panel.set_title(f"{policy}: {hit_rate(answers):.0%} of {len(answers)} requests' tokens")
    figure.savefig(file, dpi=100)


def draw_return(found: Return, replicas: Sequence[str], file: Path) -> None:
    """One panel: a replica is killed, and comes back."""
    figure, (panel,) = _panels(1)
    begin = min(x.at - x.seconds for x in found.answers)
    _curves(panel, found.answers, replicas, begin)
    for when, what in ((found.killed_at, "killed"), (found.returned_at, "back")):
        panel.axvline(when - begin, color="black", linestyle="--", linewidth=1)
        panel.annotate(f" {what}", (when - begin, 1.02), fontsize="small")
    panel.set_title(f"{found.replica} is killed and comes back")
    figure.savefig(file, dpi=100)


def _panels(count: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * count, 4), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set(xlabel="seconds", ylim=(-0.02, 1.1))
    panels[0].set_ylabel(f"prefix-hit rate of the latest {WINDOW} requests")
    return figure, panels


def _curves(panel: Any, answers: Sequence[Answered], replicas: Sequence[str], begin: float) -> None:
    for style, (name, own) in zip(_STYLES, by_replica(answers, replicas).items(), strict=False):
        points = over_time(own)
        panel.plot(
            [point.at - begin for point in points],
            [point.hit_rate for point in points],
            style,
            markersize=3,
            label=f"{name} ({len(own)} requests)",
        )
    panel.legend(loc="lower right", fontsize="small")
