# SPDX-License-Identifier: Apache-2.0
"""The page and the figure of `bench.serving.ample`."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from bench.serving.common import table
from tests.support.harness import Json

SHOWN = {
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "TTFT p50, ms",
    "p99_ttft_ms": "TTFT p99, ms",
    "median_itl_ms": "ITL p50, ms",
    "p99_itl_ms": "ITL p99, ms",
}


def gains(rounds: list[Json], metric: str) -> list[float]:
    """How many times better ours is, round by round: rates over stock's, times under it."""
    ratios = [one["diffxkv"][metric] / one["stock"][metric] for one in rounds]
    return ratios if metric == "output_throughput" else [1 / ratio for ratio in ratios]


def report(result: Json) -> str:
    note = (
        "`python -m sglang.benchmark.serving` against each server in turn, all requests of a load "
        "sent at once (those of `alone` one after the other), greedy, empty caches, page size 64, "
        "one thread a server, both asleep when idle. Stock: `torch_native` attention, the only one "
        "that it has for such CPUs, on the platform that this package brings; its model layers are "
        "SGLang's plain ones. diffxkv: defaults, as many bytes. Medians over the rounds; *gain* is "
        "how many times better ours is, within a round: the median, the least and the most."
    )
    sections = [note]
    sections += [f"- {name}: `--dataset-name {load}`" for name, load in result["loads"].items()]
    for setting, loads in result["runs"].items():
        rows: list[list[object]] = [["load", "rounds", "measure", "stock", "diffxkv", "gain"]]
        for load, rounds in loads.items():
            for metric, title in SHOWN.items():
                sides = (median(one[s][metric] for one in rounds) for s in ("stock", "diffxkv"))
                found = gains(rounds, metric)
                spread = f"{median(found):.2f} ({min(found):.2f}–{max(found):.2f})"
                rows.append([load, len(rounds), title, *(f"{x:.1f}" for x in sides), spread])
        sections.append(f"## {setting}\n\n{table(rows)}")
    return "\n\n".join(sections)


def plot(path: Path, result: Json) -> None:
    """Write a picture: gains of every measure, a panel for each setting."""
    from matplotlib.figure import Figure

    runs = result["runs"]
    figure = Figure(figsize=(9, 3.2 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for panel, (setting, loads) in zip(panels, runs.items(), strict=True):
        width = 0.8 / len(loads)
        for i, (load, rounds) in enumerate(loads.items()):
            found = [gains(rounds, metric) for metric in SHOWN]
            middle = [median(values) for values in found]
            ends = [
                [m - min(values) for m, values in zip(middle, found, strict=True)],
                [max(values) - m for m, values in zip(middle, found, strict=True)],
            ]
            at = [x + i * width - 0.4 + width / 2 for x in range(len(SHOWN))]
            panel.bar(at, middle, width, yerr=ends, capsize=2, label=load)
        panel.set_xticks(range(len(SHOWN)), [title.split(",")[0] for title in SHOWN.values()])
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(title=setting, ylabel="times better than stock")
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(path)
