# SPDX-License-Identifier: Apache-2.0
"""The ways to quantize that `quantizers` compares."""

from __future__ import annotations

from typing import NamedTuple

from bench.accuracy.fake_quantization import Side
from sglang_diffxkv.kernels.layout import FORMATS, TierFormat
from sglang_diffxkv.kernels.pack.quantize import CLIP

TIERS = [FORMATS[name] for name in ("K8V4", "K4V4", "K4V2", "K2V2")]
SWEPT = (1.0, 0.95, 0.9, 0.8, 0.7, 0.65, 0.6, 0.5)
"""Shares that are tried."""


class Option(NamedTuple):
    """One way for keys and values; `clip`: with `CLIP`, which depends on the bits."""

    name: str
    key: Side = Side()
    value: Side = Side()
    clip: bool = False

    def sides(self, tier: TierFormat) -> tuple[Side, Side]:
        if not self.clip:
            return self.key, self.value
        key, value = CLIP[tier.key_bits], CLIP[tier.value_bits]
        return self.key._replace(clip=key), self.value._replace(clip=value)


_ROTATED, _CHANNEL = Side(rotated=True), Side(by_channel=True)
OPTIONS = [
    Option("min/max"),
    Option("clip", clip=True),
    Option("clip by row", Side(clip=None), Side(clip=None)),
    Option("2 groups", Side(groups=2), Side(groups=2)),
    Option("2 groups, clip", Side(groups=2), Side(groups=2), clip=True),
    Option("4 groups", Side(groups=4), Side(groups=4)),
    Option("4 groups, clip", Side(groups=4), Side(groups=4), clip=True),
    Option("K rotated", _ROTATED),
    Option("V rotated", value=_ROTATED),
    Option("K rotated, clip", _ROTATED, clip=True),
    Option("K and V rotated, clip", _ROTATED, _ROTATED, clip=True),
    Option("K rotated, K 2 groups, clip", Side(rotated=True, groups=2), clip=True),
    Option("K rotated, V 2 groups, clip", _ROTATED, Side(groups=2), clip=True),
    Option("K by channel", _CHANNEL),
    Option("K by channel, clip", _CHANNEL, clip=True),
]
