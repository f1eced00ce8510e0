# SPDX-License-Identifier: Apache-2.0
"""What the reports of all evaluations have in common: tables, notes, files, panels of a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from sglang_diffxkv.eval.record import Record


def table(cells: Sequence[Sequence[str]]) -> str:
    """Markdown of rows of cells, the first of which is the head."""
    head, *body = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|" + " --- |" * len(cells[0]), *body])


def tiers_cell(record: Record) -> str:
    """Shares of the tiers."""
    if record.kept_high is None or record.kept_low is None or record.pruned is None:
        return "–"
    return f"{record.kept_high:.0%} / {record.kept_low:.0%} / {record.pruned:.0%}"


def head_of_page(title: str, about: str, note: str, records: Sequence[Record]) -> list[str]:
    """Paragraphs before the tables, with a warning where figures do not hold."""
    parts = [f"# {title}", about, note]
    if early := [record for record in records if record.under_pressure]:
        names = ", ".join(dict.fromkeys(record.label for record in early))
        parts.append(f"**Memory ran out and pages were sealed early: {names}.**")
    return parts


def by_length(records: Sequence[Record]) -> list[tuple[int, list[Any]]]:
    """Records of each length, which ascends."""
    return [
        (length, [record for record in records if record.length == length])
        for length in sorted({record.length for record in records})
    ]


def write_files(output: Path, content: dict[str, Any], page: str) -> None:
    """Write `content` as JSON to `output`, and the page beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(plain(content), indent=1) + "\n")
    output.with_suffix(".md").write_text(page)


def plain(value: Any) -> Any:
    """What JSON holds of it: objects by their fields, and the name of a file alone."""
    if isinstance(value, Path):
        return value.name
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def panels(columns: int, width: float, **share: Any) -> tuple[Any, Any]:
    """A figure and its panels, two rows of them, which may share axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 8), layout="constrained")
    found = figure.subplots(2, columns, squeeze=False, **share)
    for panel in found.flat:
        panel.grid(alpha=0.3)
    return figure, found


def marker(number: int) -> str:
    """Of the curve with that number."""
    return "os^vD*Px<>d"[number % 11]
