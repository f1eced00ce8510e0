# SPDX-License-Identifier: Apache-2.0
"""The page: our policies by compression, and the peers beside the default policy at their bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.accuracy.real_models.methods import PREDICTED
from bench.accuracy.real_models.protocol import WINDOW, Sample
from bench.accuracy.real_models.results import LLAMA, OURS, PEERS, Results
from bench.accuracy.real_models.summary import Interval, Summary, ratio, summarize
from bench.serving.common import table

FEWER_BYTES = 0.05
"""How many fewer than a peer the default policy may take where they are put side by side."""
HEAD = [
    "method",
    "compression",
    "with window",
    "mean KL",
    "p99 KL",
    "perplexity",
    "top-1 agreement",
]


def report(results: Results, samples: Sequence[Sample]) -> str:
    ours = _summaries(results, OURS)
    peers = _summaries(results, PEERS) + _summaries(results, LLAMA)
    names = {s.row.name for s in ours}
    best = PREDICTED if PREDICTED in names else "diffxkv"
    default = [s for s in ours if s.row.name == best and s.row.target is not None]
    parts = [_method(results, samples), "## Our policies", table([HEAD, *map(_cells, ours)])]
    if peers:
        rows = [[*_cells(s), *_beside(s, default)] for s in peers]
        head = [*HEAD, f"KL of `{best}` at these bytes", "times that"]
        parts += ["## Peers", table([head, *rows])]
    return "\n\n".join(parts)


def _summaries(results: Results, family: str) -> list[Summary]:
    found = [summarize(results, row) for row in results.rows if row.family == family]
    return sorted(found, key=lambda summary: (summary.row.name, summary.compression))


def _method(results: Results, samples: Sequence[Sample]) -> str:
    lengths = sorted(2 * sample.prefilled for sample in samples)
    after = max(len(sample.after) for sample in samples)
    full = sum(results.full.values()) / max(1, len(results.full))
    packages = ", ".join(f"{name} {version}" for name, version in results.packages.items())
    alphas = (f"{x}×: {high:.3g} / {low:.3g}" for x, (high, low) in results.alphas.items())
    return f"""\
{len(samples)} documents (Python's documentation) of {lengths[0]:,} to {lengths[-1]:,} tokens. The
first half of each is prefilled with full attention, all of it but the last {WINDOW} tokens is
compressed, and one forward pass over what that left gives the distributions after the next {after}
tokens, to compare with those over the full cache: KL(full || compressed) in nats per token over
the whole vocabulary. Perplexity with full KV: {math.exp(full):.3f}. The model computes in fp32;
bytes are those of bf16. Compression: 16-bit bytes of the compressed tokens over all bytes that
stand for them: codes, scales, frames with their slack, directory entries; in the second column the
raw window is added on both sides. In brackets 95 % intervals over documents (bootstrap); p99 KL is
the mean over documents of each one's 99th percentile. `diffkv`'s thresholds keep the paper's ratio,
and were scaled on other documents until their bytes met the target (α_high / α_low for
{", ".join(alphas) or "none"}). Peers: {packages or "not asked"}."""


def _cells(summary: Summary) -> list[object]:
    row = summary.row
    name = row.name if row.target is None else f"{row.name}, for {row.target:.3g}×"
    return [
        name,
        f"{summary.compression:.2f}×",
        f"{summary.with_window:.2f}×",
        _spread(summary.kl, ".2g"),
        f"{summary.p99_kl.value:.2g}",
        _spread(summary.perplexity, ".2f"),
        _spread(summary.agreement, ".1%"),
    ]


def _beside(peer: Summary, default: Sequence[Summary]) -> list[object]:
    """The default policy at the peer's bytes or slightly fewer, if it was asked there."""
    near = [s for s in default if -0.005 < s.compression / peer.compression - 1 < FEWER_BYTES]
    if not near:
        return ["", ""]
    ours = min(near, key=lambda s: s.compression)
    return [f"{ours.kl.value:.2g}", _spread(ratio(peer.row, ours.row), ".2f")]


def _spread(x: Interval, form: str) -> str:
    return f"{x.value:{form}} ({x.low:{form}} to {x.high:{form}})"
