# SPDX-License-Identifier: Apache-2.0
"""Ways to quantize keys or values of a real model, one side at a time, the other exact.

Simulated: all tokens of the first half but the sinks are quantized in one format; for ways that are
not ours the project has no kernels. `choices` asks the code itself.

    python -m bench.accuracy.real_models.ways MODEL [--documents 3] [--length 1024]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from bench.accuracy.fake_quantization import Side, quantized
from bench.accuracy.real_models.__main__ import make_samples
from bench.accuracy.real_models.options import parse
from bench.accuracy.real_models.protocol import measure
from bench.accuracy.real_models.reader import LayerPrefix, Reader
from bench.serving.common import table, write_results
from sglang_diffxkv.kernels.layout import PAGE_TOKENS

SINKS = 4

Read = Callable[[torch.Tensor], torch.Tensor]
"""What fp32 rows [L, H, n, D] are read back as."""


class Way(NamedTuple):
    """Of one side, "keys" or "values"."""

    side: str
    bits: int
    name: str
    read: Read


def ways() -> Iterator[Way]:
    for bits, clips in ((4, (0.9, 0.95, 1.0)), (2, (0.65, 0.75, 0.8, 0.85))):
        for clip in clips:
            plain, rotated = Side(clip), Side(clip, rotated=True)
            channel = Side(clip, by_channel=True)
            for side in ("keys", "values"):
                yield Way(side, bits, f"min/max × {clip:g}", _as(bits, plain))
                yield Way(side, bits, f"rotated × {clip:g}", _as(bits, rotated))
                yield Way(side, bits, f"by channel × {clip:g}", _as(bits, channel))
            for name, mean in (("page's mean", _of_page), ("one mean", _of_all)):
                centred = _centred(mean, bits, rotated)
                yield Way("keys", bits, f"{name}, rotated × {clip:g}", centred)


def _as(bits: int, side: Side) -> Read:
    return lambda rows: quantized(rows, bits, side)


def _centred(mean: Read, bits: int, side: Side) -> Read:
    def read(rows: torch.Tensor) -> torch.Tensor:
        centre = mean(rows)
        return quantized(rows - centre, bits, side) + centre

    return read


def _of_page(rows: torch.Tensor) -> torch.Tensor:
    pages = rows.unflatten(-2, (-1, PAGE_TOKENS))
    return pages.mean(-2, keepdim=True).expand_as(pages).flatten(-3, -2)


def _of_all(rows: torch.Tensor) -> torch.Tensor:
    return rows[..., SINKS:, :].mean(-2, keepdim=True)


def main() -> None:
    options = parse(__doc__.splitlines()[0], documents=3)
    reader, tried = Reader(options.model), list(ways())
    found: list[list[tuple[float, float]]] = [[] for _ in tried]
    for sample in make_samples(options.model, options.documents, [options.length]):
        states = reader.prefill(sample.before)
        exact = {"keys": states.keys, "values": states.values}
        full = reader.log_probabilities(sample.after, sample.prefilled, _prefix(exact))
        for way, answers in zip(tried, found, strict=True):
            rows = exact[way.side]
            read = way.read(rows)
            read[..., :SINKS, :] = rows[..., :SINKS, :]
            logs = reader.log_probabilities(
                sample.after, sample.prefilled, _prefix(exact | {way.side: read})
            )
            error = float((read - rows).norm() / rows[..., SINKS:, :].norm())
            answers.append((measure(full, logs, sample, 0).kl, error))
    lines: list[list[object]] = [["side", "bits", "way", "KL", "relative error"]]
    rows = []
    for way, answers in zip(tried, found, strict=True):
        kl, error = (sum(x) / len(x) for x in zip(*answers, strict=True))
        rows.append(way._asdict() | {"read": None, "kl": kl, "error": error})
        lines.append([way.side, way.bits, way.name, f"{kl:.2g}", f"{error:.3f}"])
    text = f"{options.documents} documents of {options.length:,} tokens.\n\n{table(lines)}"
    title = f"{options.model.name}: ways to quantize"
    write_results("real_models_ways", title, {"rows": rows}, text)


def _prefix(states: dict[str, torch.Tensor]) -> list[LayerPrefix]:
    pairs = zip(states["keys"], states["values"], strict=True)
    return [LayerPrefix(*pair) for pair in pairs]


if __name__ == "__main__":
    main()
