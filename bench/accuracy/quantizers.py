# SPDX-License-Identifier: Apache-2.0
"""Ways to quantize sealed pages, compared at equal bytes on the bundled model's keys and values.

The tokens of all full pages but the last 64 tokens are quantized in one format; the rest of the
prompt and the answer are computed over them (`answers`). No server: the ways that lost exist here
only (`fake_quantization`).

    python -m bench.accuracy.quantizers [--samples 25]
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from bench.accuracy.answers import WINDOW, Prefill, Reader
from bench.accuracy.bundled import parse
from bench.accuracy.fake_quantization import Side, quantized
from bench.accuracy.quantizer_options import OPTIONS, SWEPT, TIERS
from bench.accuracy.quantizer_report import (
    GAUSSIAN,
    MODEL,
    WITH_OUTLIERS,
    Key,
    Sample,
    report,
    summarize,
)
from bench.serving.common import write_results
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.kernels.layout import TierFormat

TASKS = ["niah_multikey", "kv_lookup", "vt", "recall"]
OUTLIERS, FACTOR = (5, 20, 37, 52), 10.0
"""Key channels, two of RoPE's pairs at D = 64, that are made larger, and how much."""
GAUSSIAN_DIM, GAUSSIAN_TOKENS, GAUSSIAN_ROUNDS = 128, 1024, 4

Found = dict[Key, list[Sample]]


class Readings:
    """What the ways read back of some keys and values, each worked out once.

    Args:
        kv: fp32 [2, ..., n, D].
        channels: fp32 [D], by how much larger the key channels are when they are quantized; what is
            read back is divided by it, as if the queries' channels were that much smaller.
    """

    def __init__(self, kv: torch.Tensor, channels: torch.Tensor) -> None:
        self._exact = (kv[0] * channels, kv[1])
        self._factors = (channels, torch.ones(()))
        self._memo: dict[tuple[int, int, Side], tuple[torch.Tensor, float]] = {}

    def __call__(self, index: int, bits: int, side: Side) -> tuple[torch.Tensor, float]:
        """Keys (index 0) or values (1) [..., n, D], and their relative error."""
        key = (index, bits, side)
        if key not in self._memo:
            exact = self._exact[index]
            found = quantized(exact, bits, side)
            error = float((found - exact).norm() / exact.norm())
            self._memo[key] = found / self._factors[index], error
        return self._memo[key]

    def of_options(self, tier: TierFormat) -> tuple[torch.Tensor, list[tuple[float, float]]]:
        """What all `OPTIONS` read back in one format [options, 2, ..., n, D], and their errors."""
        pairs = []
        for option in OPTIONS:
            key, value = option.sides(tier)
            pairs.append((self(0, tier.key_bits, key), self(1, tier.value_bits, value)))
        batch = torch.stack([torch.stack([k, v]) for (k, _), (v, _) in pairs])
        return batch, [(k, v) for (_, k), (_, v) in pairs]


def with_outliers(dim: int) -> torch.Tensor:
    channels = torch.ones(dim)
    channels[list(OUTLIERS)] = FACTOR
    return channels


class Outputs:
    """Attention's output for the last queries, and how far from it other keys and values lead.

    Args:
        q: fp32 [L, Hq, n, D].
        kv: fp32 [2, L, H, n, D].
    """

    def __init__(self, q: torch.Tensor, kv: torch.Tensor) -> None:
        self._q, self._kv = q[..., -WINDOW:, :], kv
        self._mask = torch.ones(WINDOW, kv.shape[-2], dtype=torch.bool).tril(kv.shape[-2] - WINDOW)
        self._exact = self._attend(kv)

    def error(self, sealed: torch.Tensor) -> float:
        """Mean relative error with the first s tokens replaced by `sealed` [2, L, H, s, D]."""
        rest = self._kv[..., sealed.shape[-2] :, :]
        found = self._attend(torch.cat([sealed, rest], -2))
        return float(((found - self._exact).norm(dim=-1) / self._exact.norm(dim=-1)).mean())

    def _attend(self, kv: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = scaled_dot_product_attention(
            self._q, *kv, attn_mask=self._mask, enable_gqa=True
        )
        return found


def sweep(reader: Reader, prefill: Prefill, found: Found) -> None:
    """Clips of one side at a time, the other side exact."""
    sealed = prefill.kv[..., : prefill.sealed, :]
    ones = torch.ones(sealed.shape[-1])
    sides = [Side(clip, rotated) for rotated in (False, True) for clip in SWEPT]
    for name, index, channels in (
        (MODEL, 0, ones),
        (WITH_OUTLIERS, 0, with_outliers(len(ones))),
        (MODEL, 1, ones),
    ):
        readings = Readings(sealed, channels)
        for bits in (4, 2):
            batch, errors = torch.stack([sealed] * len(sides)), []
            for row, side in zip(batch, sides, strict=True):
                row[index], error = readings(index, bits, side)
                errors.append(error)
            agreements = reader.agreements(prefill, batch)
            for side, error, got in zip(sides, errors, agreements, strict=True):
                sample = Sample(error, error, None, got.kl, got.same)
                found[name, "KV"[index], bits, side.rotated, side.clip].append(sample)


def compare(reader: Reader, prefill: Prefill, found: Found) -> None:
    """All options of all formats, with the model's keys and with outliers among them."""
    sealed = prefill.kv[..., : prefill.sealed, :]
    dim, outputs = sealed.shape[-1], Outputs(prefill.q, prefill.kv)
    for name, channels in ((MODEL, torch.ones(dim)), (WITH_OUTLIERS, with_outliers(dim))):
        readings = Readings(sealed, channels)
        for tier in TIERS:
            batch, errors = readings.of_options(tier)
            agreements = reader.agreements(prefill, batch)
            for option, row, error, got in zip(OPTIONS, batch, errors, agreements, strict=True):
                sample = Sample(*error, outputs.error(row), got.kl, got.same)
                found[name, tier.name, option.name].append(sample)


def compare_gaussian(found: Found) -> None:
    """Errors of random tokens with outlier key channels, which queries see at full size."""
    n, dim = GAUSSIAN_TOKENS, GAUSSIAN_DIM
    for seed in range(GAUSSIAN_ROUNDS):
        gen = torch.Generator().manual_seed(seed)
        q = torch.randn(1, 8, n, dim, generator=gen)
        kv = torch.randn(2, 1, 2, n, dim, generator=gen)
        kv[0] *= with_outliers(dim)
        readings, outputs = Readings(kv[..., : n - WINDOW, :], torch.ones(dim)), Outputs(q, kv)
        for tier in TIERS:
            for option, row, error in zip(OPTIONS, *readings.of_options(tier), strict=True):
                sample = Sample(*error, outputs.error(row))
                found[GAUSSIAN, tier.name, option.name].append(sample)


def main() -> None:
    options, _, cells = parse(__doc__.splitlines()[0], TASKS)
    reader = Reader(BUNDLED)
    found: Found = defaultdict(list)
    for prompt in tqdm([prompt for cell in cells for prompt in cell.prompts]):
        prefill = reader.prefill(prompt.ids)
        sweep(reader, prefill, found)
        compare(reader, prefill, found)
    compare_gaussian(found)
    about = (
        f"{BUNDLED.name}, fp32: {options.samples} prompts of each of {', '.join(TASKS)}, "
        f"{options.length} tokens."
    )
    rows = {key: summarize(samples) for key, samples in found.items()}
    result = {"rows": [{"case": key, **row._asdict()} for key, row in rows.items()]}
    write_results("quantizers", "Ways to quantize sealed pages", result, report(rows, about))


if __name__ == "__main__":
    main()
