# SPDX-License-Identifier: Apache-2.0
"""Which elements of a model's keys RoPE turns: found out, as configurations differ in names."""

from __future__ import annotations

from itertools import product

import torch

from sglang_diffxkv.calibrate.importance.reading import TextReader
from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.policy.importance.features import Rotary, features

_SHIFT = 97
"""Tokens; prime, so that no pair has turned back to where it was."""
_SAME = 0.03
"""Relative error of what should be equal; bf16 keys have up to a hundredth."""


def find_rotary(reader: TextReader, text: torch.Tensor) -> Rotary:
    """Compare the keys of some tokens, int64 [n], with those of the same tokens further on.

    Raises:
        ConfigError: neither pairs of halves nor of neighbours keep their lengths.
    """
    here, there = (reader.first_keys(text, start) for start in (0, _SHIFT))
    return rotary_of(here, there)


def rotary_of(here: torch.Tensor, there: torch.Tensor) -> Rotary:
    """The pairs of keys [..., D] whose lengths are the same at another position.

    The most of them: pairs that are not turned keep their lengths, too.
    """
    dim = here.shape[-1]
    for dims, interleaved in product(range(dim, -1, -2), (False, True)):
        rotary = Rotary(dims, interleaved)
        one, other = (features(keys, keys[..., :0], rotary) for keys in (here, there))
        one, other = (_lengths(x, dims // 2) for x in (one, other))
        if float((one - other).norm()) <= _SAME * float(one.norm()):
            return rotary
    raise ConfigError("the model's keys are turned by their positions in a way that is not known")


def _lengths(x: torch.Tensor, pairs: int) -> torch.Tensor:
    """Features with lengths in place of log energies, which blow up what is next to nothing."""
    return torch.cat([(x[..., :pairs] / 2).exp(), x[..., pairs:]], -1)
