# SPDX-License-Identifier: Apache-2.0
"""What rows are quantized by: `naive.quantize_row` is the definition."""

from __future__ import annotations

FP16_MAX = 65504.0
"""Largest scale and zero: what lies beyond saturates."""
CLIP = {8: 1.0, 4: 1.0, 2: 0.8}
"""By bits: share of a row's min/max range that codes cover, about its centre; what lies outside
saturates (``docs/decisions/016``)."""
