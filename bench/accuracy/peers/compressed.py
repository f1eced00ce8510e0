# SPDX-License-Identifier: Apache-2.0
"""What a peer has made of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from bench.accuracy.real_models.reader import Prefix

RAW_BYTES = 2
"""Of a floating-point element, whatever it is kept in here."""


class Compressed(NamedTuple):
    """A peer's cache of a prompt.

    Attributes:
        name: the peer with its settings. target: the compression that these are made for, if any.
        prefix: what attention sees, the window included. nbytes: of all but the window.
    """

    name: str
    target: float | None
    prefix: Prefix
    nbytes: float


def nbytes(value: Any) -> int:
    """Of all tensors in `value`, which may be nested; floating-point elements count as 16-bit."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a subclass made of others
            parts, _ = value.__tensor_flatten__()
            return sum(nbytes(getattr(value, part)) for part in parts)
        return value.numel() * (RAW_BYTES if value.is_floating_point() else value.itemsize)
    if isinstance(value, Mapping):
        return sum(nbytes(x) for x in value.values())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return sum(nbytes(x) for x in value)
    return 0
