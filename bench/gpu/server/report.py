# SPDX-License-Identifier: Apache-2.0
"""The servers' report in Markdown, of whatever is known so far."""

from __future__ import annotations

from typing import Any

from bench.gpu.report.markdown import table

Record = dict[str, Any]


def failures(record: Record) -> list[str]:
    """One line for everything that went wrong."""
    lines = [
        f"{key.removeprefix('failed: ')}: {_reason(value)}"
        for key, value in record.items()
        if key.startswith("failed: ")
    ]
    # Stock's kernels round otherwise: one near tie, and the rest of an answer is another.
    lines += [
        f"lossless outputs of {name} differ: {found['alone']} are equal"
        for name, found in record.get("equality, lossless", {}).items()
        if name != "stock" and not found["all_alone"]
    ]
    return lines


def _reason(text: str) -> str:
    """The last line of a log that names an error, or else the last one."""
    lines = text.splitlines() or [""]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300]


def report(record: Record) -> str:
    """The whole page."""
    parts = [f"# Servers on {record['device']}, {record.get('seconds', 0):.0f} s"]
    if failed := failures(record):
        parts.append("## FAILED\n\n" + "\n".join(f"- **{line}**" for line in failed))
    loads = {x["name"]: x for x in record.get("loads", [])}
    for name, size in loads.items():
        if rates := record.get(f"throughput, {name}"):
            ratios = record.get(f"ratio to stock, {name}", {})
            rows = [[key, *x, ratios.get(key, "–")] for key, x in rates.items()]
            rounds = max(len(x) for x in rates.values())
            rows = [[row[0], *row[1:-1], *["–"] * (rounds + 2 - len(row)), row[-1]] for row in rows]
            head = ["server", *(f"round {i + 1}" for i in range(rounds)), "median to stock's"]
            parts.append(
                f"## Throughput, {name}\n\n{size['requests']} requests x {size['prompt']} + "
                f"{size['output']} tokens, pools of {record['memory_bytes'] / 2**30:.3g} GiB; "
                f"output tokens per second.\n\n{table(head, rows)}"
            )
    for title in ("lossless", "compressed"):
        if found := record.get(f"equality, {title}"):
            rows = [[name, x["alone"], x["together"]] for name, x in found.items()]
            head = ["against", "asked alone", "asked together"]
            parts.append(f"## Equal outputs, {title}\n\n{table(head, rows)}")
    if steps := record.get("step_seconds"):
        rows = [[name, *(1e3 * x for x in values)] for name, values in steps.items()]
        parts.append(
            "## Decode step of one request, small model, ms\n\n"
            + table(["server", "round 1", "round 2"], rows)
        )
    for name, found in record.get("syncs", {}).items():
        rows = [[site, count / found["decode_steps"]] for site, count in found["syncs"].items()]
        parts.append(
            f"## Hidden waits, {name}\n\n{found['decode_steps']} decode steps.\n\n"
            + (table(["line", "a step"], rows) or "None.")
        )
    if starts := record.get("start_seconds"):
        parts.append("## Started after, s\n\n" + table(["server", "s"], list(starts.items())))
    return "\n\n".join(parts) + "\n"
