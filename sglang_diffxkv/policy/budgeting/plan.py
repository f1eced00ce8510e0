# SPDX-License-Identifier: Apache-2.0
"""A plan: thresholds and budgets by layer for traffic as it has been, solved from its sketch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, PageLayout
from sglang_diffxkv.policy.budgeting.budget import (
    Prices,
    Ranking,
    least_bytes,
    most_retained,
    rank_bins,
)
from sglang_diffxkv.policy.budgeting.sketch import BINS_PER_OCTAVE, ImportanceSketch
from sglang_diffxkv.policy.budgeting.target import (
    Target,
    divisors,
    prices_of,
    prior_of,
    raw_page_bytes,
)
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.settings import ConfigError

FORMAT = 3
"""Of plan files; raised whenever their meaning changes."""
_NEVER = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class LayerPlans:
    """What tokens of each layer get; tuples have one entry per layer."""

    alpha_high: tuple[float, ...]
    """From this importance on, in units of uniform attention (1 / N), a token is high (DiffKV)."""
    alpha_low: tuple[float, ...]
    """From this one on it is kept, below it is dropped."""
    page_bytes: tuple[float, ...]
    """Expected payload of a (page, layer): the layer's budget."""
    retention: tuple[float, ...]
    """Expected R of the layer (XKV)."""


@dataclass(frozen=True)
class Shape:
    """What a plan is made for: its importances mean nothing to another model.

    The tiers are for the record: thresholds are solved again for those of the server.
    """

    layers: int
    kv_heads: int
    head_dim: int
    high: str
    low: str

    @property
    def model(self) -> tuple[int, int, int]:
        """[L, H, D]: what the model says, the tiers apart."""
        return self.layers, self.kv_heads, self.head_dim

    @classmethod
    def of(cls, layout: PageLayout, num_layers: int) -> Shape:
        heads, dim = layout.num_kv_heads, layout.head_dim
        return cls(num_layers, heads, dim, layout.high.name, layout.low.name)


@dataclass(frozen=True)
class Plan:
    """Immutable; pages record the number of the plan they were sealed under."""

    number: int
    """1, 2, ... as they were solved."""
    target: float
    shape: Shape
    qualities: dict[Quality, LayerPlans]
    sketch: ImportanceSketch
    """What it was solved from."""
    key_means: torch.Tensor | None = None
    """fp32 [L, H, D] that sealed keys lack (`kernels.basis.sealed`); None: not known."""
    importance: str | None = None
    """Hash of the importance model whose predictions were sketched; None: there was none."""

    def save(self, path: Path) -> None:
        """Write the plan as JSON, in one step: a reader never sees half of it."""
        key_means = self.key_means
        if key_means is not None and not bool(key_means.any()):
            key_means = None  # not set yet, or of no head: whoever loads the plan finds out
        text = json.dumps(
            {
                "format": FORMAT,
                "number": self.number,
                "target": self.target,
                "shape": asdict(self.shape),
                "importance": self.importance,
                "qualities": {
                    quality.name.lower(): asdict(layers)
                    for quality, layers in self.qualities.items()
                },
                "sketch": self.sketch.to_json(),
                "key_means": None if key_means is None else _rounded(key_means.tolist()),
            }
        )
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)


def _rounded(numbers: Any) -> Any:
    """Nested lists of numbers with as many digits as matter: their text is most of the file."""
    if isinstance(numbers, list):
        return [_rounded(x) for x in numbers]
    return float(f"{numbers:.5g}")


class SavedPlan(NamedTuple):
    """What a plan file has of a plan; all else follows from the target."""

    number: int
    sketch: ImportanceSketch
    key_means: torch.Tensor | None
    """None, too, where they were chosen for other bits: which heads are better off with one depends
    on those of high keys."""


def load_plan(path: Path, shape: Shape, importance: str | None = None) -> SavedPlan:
    """Read a plan file.

    Args:
        importance: hash of the server's importance model.

    Raises:
        ConfigError: no such file, not a plan, or one of another model, or of another importance.
    """
    try:
        found: dict[str, Any] = json.loads(path.expanduser().read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ConfigError(
                f"plan {path}: format {found['format']}, expected {FORMAT}: calibrate again"
            )
        other, sketched = Shape(**found["shape"]), found["importance"]
        number, sketch = int(found["number"]), ImportanceSketch.from_json(found["sketch"], "cpu")
        if sketch.tokens.shape[:2] != (other.layers, other.kv_heads):
            raise ValueError("sketch and shape differ")
        key_means = None if found["key_means"] is None else torch.tensor(found["key_means"])
        if key_means is not None and (
            key_means.shape != other.model or not bool(key_means.isfinite().all())
        ):
            raise ValueError("key means of another shape, or no numbers")
        if FORMATS[other.high].key_bits != FORMATS[shape.high].key_bits:
            key_means = None
    except OSError as error:
        raise ConfigError(f"plan {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"plan {path} is not one that `sglang-diffxkv calibrate` writes"
        ) from None
    if other.model != shape.model:
        raise ConfigError(
            f"plan {path} is of a model with {other.layers} layers of {other.kv_heads} KV heads "
            f"of {other.head_dim}, this one has {shape.layers} of {shape.kv_heads} of "
            f"{shape.head_dim}: calibrate with this model"
        )
    if sketched != importance:
        raise ConfigError(
            f"plan {path} was learnt {'without an' if sketched is None else 'with another'} "
            "importance model: set importance to what was written beside the plan, or calibrate "
            "again"
        )
    return SavedPlan(number, sketch, key_means)


def solve_plan(
    number: int,
    target: float,
    sketch: ImportanceSketch,
    layout: PageLayout,
    high_layers: tuple[int, ...] = (),
    importance: str | None = None,
) -> Plan:
    """The best budgets for what `sketch` (on the host) has seen.

    Args:
        high_layers: layers whose tokens all stay high.
        importance: hash of the model that predicted what was sketched, None where none did.
    """
    shape = Shape.of(layout, len(sketch.tokens))
    qualities = {
        quality: _solve(
            Target.of(target).at(quality), sketch, layout, high_layers, importance is not None
        )
        for quality in (Quality.HIGH, Quality.BALANCED, Quality.SMALL)
    }
    return Plan(number, target, shape, qualities, sketch, importance=importance)


def _solve(
    target: Target,
    sketch: ImportanceSketch,
    layout: PageLayout,
    high_layers: tuple[int, ...],
    predicted: bool,
) -> LayerPlans:
    prices, prior_mass = prices_of(layout, predicted), prior_of(target, predicted)
    tokens, mass = sketch.tokens.double(), sketch.mass.double()
    mass = mass + prior_mass * tokens
    layers = len(tokens)
    by_layer = divisors(mass.sum((1, 2)), predicted)
    share = mass / by_layer[:, None, None] / layers
    weight = share / tokens.clamp(min=1e-30)
    prior = (prior_mass / by_layer / layers)[:, None, None].expand_as(weight)
    protected = torch.zeros(layers, dtype=torch.bool)
    protected[list(high_layers)] = True
    order = weight[~protected].flatten().argsort(descending=True)
    free_tokens, free_share, free_prior = (
        x[~protected].flatten()[order] for x in (tokens, share, prior)
    )
    ranking = rank_bins(free_share, free_tokens)
    if target.retention is not None:
        split = least_bytes(ranking, prices, target.retention * float(free_share.sum()))
    else:
        assert target.compression is not None
        pages = float(tokens.sum()) / (layers * layout.num_kv_heads * PAGE_TOKENS)
        nbytes = pages * raw_page_bytes(layout, layers) / target.compression
        nbytes -= pages * layers * page_overhead(layout)
        split = most_retained(ranking, prices, nbytes - float(tokens[protected].sum()) * prices[0])
    kept = split.high + split.low
    thresholds = [_threshold(ranking, count, free_prior) for count in (split.high, kept)]
    # A weight is a share of its layer's importance; back to units of uniform attention.
    alphas = [(value * layers * by_layer).masked_fill(protected, 0.0) for value in thresholds]
    alpha_high, alpha_low = (alpha.clamp(max=_NEVER) for alpha in alphas)
    # Nothing speaks against the tokens of a layer of which nothing is known.
    unknown = sketch.mass.sum((1, 2)) == 0
    alpha_high, alpha_low = (x.masked_fill(unknown, 0.0) for x in (alpha_high, alpha_low))
    # Interpolated within bins, the two may cross by less than one.
    alpha_low = alpha_low.minimum(alpha_high)
    return _expected(alpha_high, alpha_low, tokens, mass, layout, prices)


def _threshold(ranking: Ranking, count: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Weight of the last of the heaviest ``count`` tokens, interpolated within its bin.

    Args:
        prior: float64, of each bin of the ranking, what all of its tokens' weights have in common.
    """
    if float(count) <= 0:
        return torch.tensor(torch.inf, dtype=torch.float64)
    if float(count) >= float(ranking.tokens[-1]):
        return torch.tensor(0.0, dtype=torch.float64)
    at = int((torch.searchsorted(ranking.tokens, count) - 1).clamp(min=0))
    tokens = ranking.tokens[at + 1] - ranking.tokens[at]
    weight = (ranking.mass[at + 1] - ranking.mass[at]) / tokens
    into = (count - ranking.tokens[at]) / tokens
    return prior[at] + (weight - prior[at]) * torch.exp2((0.5 - into) / BINS_PER_OCTAVE)


def _expected(
    alpha_high: torch.Tensor,
    alpha_low: torch.Tensor,
    tokens: torch.Tensor,
    mass: torch.Tensor,
    layout: PageLayout,
    prices: Prices,
) -> LayerPlans:
    """What thresholds (float64 [L]) make of a sketch's own tokens [L, H, BINS], by layer."""
    mean = mass / tokens.clamp(min=1e-30)  # [L, H, BINS]
    high, kept = (mean >= alpha[:, None, None] for alpha in (alpha_high, alpha_low))
    low = kept & ~high
    nbytes = high * prices.high_bytes + low * prices.low_bytes
    utility = high + low * prices.low_utility
    pages = tokens.sum((1, 2)).clamp(min=1e-30) / (layout.num_kv_heads * PAGE_TOKENS)
    page_bytes = (tokens * nbytes).sum((1, 2)) / pages + page_overhead(layout)
    retention = (mass * utility).sum((1, 2)) / mass.sum((1, 2)).clamp(min=1e-30)
    return LayerPlans(
        *(tuple(map(float, values)) for values in (alpha_high, alpha_low, page_bytes, retention))
    )


def page_overhead(layout: PageLayout) -> float:
    """Expected bytes of a (page, layer) beyond its tokens': heads are aligned, frames filled up."""
    return (layout.num_kv_heads * layout.align + layout.frame_bytes) / 2
