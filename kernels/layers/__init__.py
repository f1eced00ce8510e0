# SPDX-License-Identifier: Apache-2.0
"""Layers that take a handful of torch's operations each, in one pass: compiled C++ for CPUs.

They are not attention, but of a decode step on a CPU as large a part. Results equal those of
SGLang's own plain implementations to rounding.
"""

from sglang_diffxkv.kernels.layers.cpu import rms_norm, rotary, silu_and_mul

__all__ = ["rms_norm", "rotary", "silu_and_mul"]
