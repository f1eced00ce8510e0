# SPDX-License-Identifier: Apache-2.0
"""Figures and tables of `quantizers`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.accuracy.fake_quantization import token_bytes
from bench.accuracy.quantizer_options import OPTIONS, SWEPT, TIERS
from bench.serving.common import table
from sglang_diffxkv.eval.estimate import mean

MODEL, WITH_OUTLIERS, GAUSSIAN = "model", "model with outliers", "random with outliers"
KL_FLOOR = 1e-9
"""Below what rounding leaves of a KL."""
DIM = 64
"""Of the bundled model."""
Key = tuple[Any, ...]
"""Of a figure: (keys, side, bits, rotated, clip) in the sweep, (keys, format, way) elsewhere."""


class Sample(NamedTuple):
    """Of one way on one prompt; None where not measured."""

    key_error: float
    value_error: float
    output_error: float | None = None
    kl: float | None = None
    same: bool | None = None


class Summary(NamedTuple):
    """Means over samples; errors are relative, KL in nats."""

    samples: int
    key_error: float
    value_error: float
    output_error: float | None
    kl: float | None
    kl_half: float | None
    """Half of the 95 % interval of `kl`."""
    kl_geometric: float | None
    """exp of the mean logarithm: what is typical, where the mean is made by a few wrong answers."""
    exact_match: float | None


def summarize(samples: Sequence[Sample]) -> Summary:
    count = len(samples)
    averages: list[float | None] = []
    for values in zip(*samples, strict=True):
        averages.append(None if values[0] is None else sum(values) / count)
    key, value, output, kl, same = averages
    if kl is None:
        return Summary(count, key, value, output, None, None, None, None)  # type: ignore[arg-type]
    divergences = [sample.kl or 0.0 for sample in samples]
    logs = [math.log(max(value, KL_FLOOR)) for value in divergences]
    half = mean(divergences).high - kl
    return Summary(count, key, value, output, kl, half, math.exp(sum(logs) / count), same)  # type: ignore[arg-type]


def report(rows: dict[Key, Summary], about: str) -> str:
    """Text of the results page."""
    parts = [
        about,
        "All full pages but the last 64 tokens are quantized in one format, after RoPE; the rest "
        "of the prompt and the model's own full-KV answer are computed over them. KL: from full "
        "KV, mean over the answer's tokens, ± 95 % over prompts; geometric: exp of the mean log. "
        "Exact match: full KV's whole answer. K, V, output: relative errors of keys, values and "
        "the last 64 queries' attention output. Bytes: one token of one KV head, metadata and "
        f"notes included, D = {DIM}.",
        f"*{WITH_OUTLIERS}*: four key channels (two pairs of RoPE's) are ten times larger and the "
        "queries' ten times smaller, which is the same model with other weights. "
        f"*{GAUSSIAN}*: random tokens at D = 128, four key channels ten times larger, queries as "
        "they are. Output error only.",
        "## Range",
        "Codes cover a share of a row's min/max range, about its centre; one side quantized, the "
        "other exact. Relative error of the rows, then KL (geometric).",
        _sweep(rows, lambda row: f"{row.key_error:.3f}"),
        _sweep(rows, lambda row: f"{row.kl_geometric:.1e}"),
    ]
    for tier in TIERS:
        parts += [f"## {tier.name}", _format(rows, tier.name)]
    return "\n\n".join(parts)


def _sweep(rows: dict[Key, Summary], show: Any) -> str:
    groups = dict.fromkeys(key[:-1] for key in rows if len(key) == 5)
    lines: list[list[object]] = [["keys of", "side", "bits", "rotated", *SWEPT]]
    for keys, side, bits, rotated in groups:
        cells = [show(rows[keys, side, bits, rotated, clip]) for clip in SWEPT]
        lines.append([keys, side, bits, "yes" if rotated else "no", *cells])
    return table(lines)


def _format(rows: dict[Key, Summary], tier: str) -> str:
    head = ["way", "bytes", "K", "V", "output", "KL", "± 95 %", "geometric", "exact match"]
    head += [f"{WITH_OUTLIERS}: {name}" for name in ("K", "KL", "geometric", "exact match")]
    lines: list[list[object]] = [[*head, f"{GAUSSIAN}: output"]]
    formats = {found.name: found for found in TIERS}
    for option in OPTIONS:
        nbytes = token_bytes(formats[tier], *option.sides(formats[tier]), DIM)
        plain, outliers, gaussian = (
            rows[keys, tier, option.name] for keys in (MODEL, WITH_OUTLIERS, GAUSSIAN)
        )
        lines.append(
            [
                option.name,
                nbytes,
                *(f"{x:.3f}" for x in plain[1:4]),
                f"{plain.kl:.1e}",
                f"{plain.kl_half:.0e}",
                f"{plain.kl_geometric:.1e}",
                f"{plain.exact_match:.0%}",
                f"{outliers.key_error:.3f}",
                f"{outliers.kl:.1e}",
                f"{outliers.kl_geometric:.1e}",
                f"{outliers.exact_match:.0%}",
                f"{gaussian.output_error:.3f}",
            ]
        )
    return table(lines)
