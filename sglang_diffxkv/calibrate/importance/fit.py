# SPDX-License-Identifier: Apache-2.0
"""Fits an importance model to what texts needed when they were read again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import silu

from sglang_diffxkv.policy.importance.features import Rotary
from sglang_diffxkv.policy.importance.model import ImportanceModel

HIDDEN = 16
"""Units: 64 explain one per cent more of the variance, for four times the work."""
LEAST_NEEDED = 1e-4
"""Tokens that are needed less are all the same."""
_STEPS, _BATCH, _RATE, _DECAY = 1500, 512, 2e-3, 1e-3


class Samples(NamedTuple):
    """Tokens of all layers and heads: features fp16 [L, H, N, F], and T fp32 [L, H, N]."""

    features: torch.Tensor
    needed: torch.Tensor

    @property
    def log(self) -> torch.Tensor:
        """What is fitted."""
        return (self.needed + LEAST_NEEDED).log()


class _Scale(NamedTuple):
    """Means and deviations over samples, kept dimensions."""

    mean: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, dim: int) -> _Scale:
        return cls(x.mean(dim, keepdim=True), x.std(dim, keepdim=True).clamp(min=1e-4))


def fit_importance(samples: Samples, rotary: Rotary, seed: int = 0) -> ImportanceModel:
    """Least squares of log T by Adam, all layers and heads at once."""
    inputs, log = samples.features, samples.log
    layers, heads, count, width = inputs.shape
    by_input = _Scale.of(inputs[:, :, :: max(1, count // 8192)].float(), 2)
    by_log = _Scale.of(log, 2)
    target = (log - by_log.mean) / by_log.deviation
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        drawn = torch.randn(layers, heads, *shape, generator=random) * scale
        return drawn.requires_grad_()

    weight = normal(width, HIDDEN, scale=width**-0.5)
    linear = normal(width, 1, scale=0.0)
    bias = normal(1, HIDDEN + 1, scale=0.0)
    output = normal(HIDDEN, 1, scale=0.1 * HIDDEN**-0.5)
    parameters = [weight, linear, bias, output]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    for _ in range(_STEPS):
        drawn = torch.randint(count, (_BATCH,), generator=random)
        x = (inputs[:, :, drawn].float() - by_input.mean) / by_input.deviation
        hidden = x @ torch.cat([weight, linear], -1) + bias
        found = (hidden[..., -1:] + silu(hidden[..., :-1]) @ output)[..., 0]
        loss = (found - target[:, :, drawn]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return _folded(torch.cat([weight, linear], -1), bias, output, by_input, by_log, rotary)


def _folded(
    weight: torch.Tensor,
    bias: torch.Tensor,
    output: torch.Tensor,
    by_input: _Scale,
    by_log: _Scale,
    rotary: Rotary,
) -> ImportanceModel:
    """With the scales of inputs and targets in it, which it then takes and gives as they are."""
    weight = weight / by_input.deviation.transpose(-1, -2)
    bias = bias - by_input.mean @ weight
    scale, shift = by_log.deviation[..., None], by_log.mean[..., None]
    weight[..., -1:] *= scale
    bias[..., -1:] = bias[..., -1:] * scale + shift
    return ImportanceModel(rotary, weight, bias[:, :, 0], (output * scale)[..., 0])


def explained(model: ImportanceModel, samples: Samples) -> float:
    """R² of log T, mean over layers and heads; at most 1."""
    hidden = samples.features.float() @ model.weight + model.bias[:, :, None]
    found = hidden[..., -1] + (silu(hidden[..., :-1]) @ model.output[..., None])[..., 0]
    log = samples.log
    rest = (found - log).square().mean(-1) / log.var(-1, unbiased=False).clamp(min=1e-6)
    return float(1 - rest.mean())
