# SPDX-License-Identifier: Apache-2.0
"""Quality of the tier formats: relative error of attention output against float64.

Random keys, values and queries, sealed and read by the real kernels. Two kinds of keys: Gaussian,
and Gaussian with four channels eight times as large (real keys have such outlier channels).

    python bench/kernels/formats.py [--rounds 8]     # writes bench/results/formats.{md,json}
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.extend import extend_sealed
from sglang_diffxkv.kernels.layout import (
    FORMATS,
    HIGH,
    PAGE_TOKENS,
    TOKEN_METADATA_BYTES,
    PageLayout,
    TierFormat,
    make_layout,
    measure,
)
from sglang_diffxkv.kernels.pack import Grades, RawTokens, pack
from sglang_diffxkv.kernels.pages import Queries, SealedTables

HEAD_DIM, KV_HEADS, GROUP, PAGES, QUERIES = 128, 4, 4, 16, 32
OUTLIER_CHANNELS, OUTLIER_FACTOR = 4, 8.0
RESULTS = Path(__file__).parents[1] / "results"


class Tokens(NamedTuple):
    """q fp32 [QUERIES, Hq, D]; k, v bf16 [PAGES, 64, H, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def random_tokens(kind: str, gen: torch.Generator) -> Tokens:
    """One random sequence; ``kind`` is "gaussian" or "outliers"."""
    k, v = torch.randn(2, PAGES, PAGE_TOKENS, KV_HEADS, HEAD_DIM, generator=gen)
    if kind == "outliers":
        channels = torch.randperm(HEAD_DIM, generator=gen)[:OUTLIER_CHANNELS]
        k[..., channels] *= OUTLIER_FACTOR
    q = torch.randn(QUERIES, KV_HEADS * GROUP, HEAD_DIM, generator=gen)
    return Tokens(q.bfloat16(), k.bfloat16(), v.bfloat16())


def exact(tokens: Tokens) -> torch.Tensor:
    """float64 [QUERIES, Hq, D] attention over the tokens as they are."""
    k, v = (x.double().flatten(0, 1).repeat_interleave(GROUP, dim=1) for x in tokens[1:])
    scores = torch.einsum("qhd,lhd->hql", tokens.q.double(), k) / HEAD_DIM**0.5
    return torch.einsum("hql,lhd->qhd", scores.softmax(-1), v)


def layout_of(tier: TierFormat) -> PageLayout:
    return make_layout(
        head_dim=HEAD_DIM, num_kv_heads=KV_HEADS, raw_itemsize=2, high=tier, low=tier
    )


def through_pages(tokens: Tokens, tier: TierFormat) -> torch.Tensor:
    """fp32 [QUERIES, Hq, D] attention over the same tokens, all sealed in ``tier``."""
    layout = layout_of(tier)
    tiers = torch.full((PAGES, KV_HEADS, PAGE_TOKENS), HIGH, dtype=torch.uint8)
    heads, _ = measure(tiers, layout)
    frames = torch.arange(PAGES * layout.max_frames, dtype=torch.int32).view(PAGES, -1)
    arena = torch.zeros(frames.numel(), layout.frame_bytes, dtype=torch.uint8)
    pages = torch.arange(PAGES, dtype=torch.int32)
    q, k, v = tokens.q, tokens.k, tokens.v
    if layout.rotates:
        q, k, v = rotate(q.float()), rotate(k.float()), v.float()
    tables = SealedTables(arena, frames, heads, layout)
    pack(RawTokens(k, v, pages), Grades(tiers, torch.zeros_like(tiers)), tables)
    asked, listed, after = (torch.tensor(x).int() for x in ([0, QUERIES], [0, PAGES], [PAGES * 64]))
    queries = Queries(q, asked, after)
    return extend_sealed(queries, tables.listed(listed, pages), HEAD_DIM**-0.5).out


def errors(kind: str, tier: TierFormat, rounds: int) -> torch.Tensor:
    """Relative error of each (sequence, query, head)'s output, one number each."""
    found = []
    for seed in range(rounds):
        tokens = random_tokens(kind, torch.Generator().manual_seed(seed))
        expected = exact(tokens)
        difference = (through_pages(tokens, tier).double() - expected).norm(dim=-1)
        found.append((difference / expected.norm(dim=-1)).flatten())
    return torch.cat(found)


def summarize(kind: str, tier: TierFormat, rounds: int) -> dict[str, str | int | float]:
    """One row of the results."""
    sample = errors(kind, tier, rounds)
    token_bytes = layout_of(tier).token_bytes(tier)
    return {
        "keys": kind,
        "format": tier.name,
        "bytes_per_token_and_head": token_bytes,
        "times_smaller_than_bf16": round(4 * HEAD_DIM / token_bytes, 2),
        "samples": len(sample),
        "mean": float(sample.mean()),
        "median": float(sample.median()),
        "p95": float(sample.quantile(0.95)),
        "max": float(sample.max()),
    }


def table(rows: list[dict[str, str | int | float]], rounds: int) -> str:
    """Markdown of all rows."""
    lines = [
        "# Error of attention output by tier format",
        "",
        f"`python bench/kernels/formats.py --rounds {rounds}`. Relative error (norm) of each query "
        "head's output against float64 attention over the unquantized tokens. Random tokens: "
        f"{PAGES * PAGE_TOKENS} of them, head_dim {HEAD_DIM}, {KV_HEADS} KV heads of {GROUP} query "
        f"heads, {QUERIES} queries, {rounds} sequences, all tokens in one tier. Outliers: "
        f"{OUTLIER_CHANNELS} key channels times {OUTLIER_FACTOR:g}. Scores of random tokens are "
        "nearly flat, so outputs are small averages of many values and relative errors large; this "
        "compares formats, and says nothing about a model's quality. "
        "Bytes: one token of one KV head, with scales and "
        f"{TOKEN_METADATA_BYTES} bytes of metadata.",
        "",
        "| keys | format | bytes | × smaller than bf16 | samples | mean | median | p95 | max |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{x:.2e}" if k in ERROR_COLUMNS else str(x) for k, x in row.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


ERROR_COLUMNS = ("mean", "median", "p95", "max")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="random sequences per row")
    rounds = parser.parse_args().rounds
    rows = [
        summarize(kind, tier, rounds)
        for kind in ("gaussian", "outliers")
        for tier in FORMATS.values()
    ]
    text = table(rows, rounds)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "formats.md").write_text(text)
    (RESULTS / "formats.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
