# SPDX-License-Identifier: Apache-2.0
"""What a user can set about every policy; a policy with knobs of its own extends it.

The docstring of a field is its line in docs/settings.md; `Allowed` is what a user reads when a
value is refused.
"""

from typing import Annotated, NamedTuple, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, TierFormat

CHECKED = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)
"""Of dataclasses of settings: every value is checked, and raises pydantic's ValidationError."""
_Format = Annotated[str, Field(pattern=f"^({'|'.join(FORMATS)})$")]
_Share = Annotated[float, Field(gt=0, le=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is one line that says what is allowed."""


class Allowed(NamedTuple):
    """What a setting may be, to go on after "expected"."""

    text: str


@dataclass(frozen=True, config=CHECKED)
class Tiers:
    """Names of the formats (`kernels.layout.FORMATS`) of the two tiers."""

    high: _Format = "K8V4"
    low: _Format = "K4V2"

    @property
    def formats(self) -> tuple[TierFormat, TierFormat]:
        return FORMATS[self.high], FORMATS[self.low]

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        high, low = self.formats
        if _bits(low) > _bits(high):
            raise ValueError(f"tiers: low ({low.name}) takes more bytes than high ({high.name})")
        return self


def _bits(tier: TierFormat) -> int:
    return 2 * 32 if tier.is_raw else tier.key_bits + tier.value_bits


@dataclass(frozen=True, config=CHECKED)
class PolicySettings:
    """Settings of every policy."""

    policy: Annotated[str, Allowed("the name of a policy")] = "diffxkv"
    """`diffxkv`: tiers by attention, within budgets that are solved for `target`. `diffkv`: tiers
    by thresholds on attention. `xkv`: budgets by layer in 16 bit
    ([XKV](https://arxiv.org/abs/2412.05896), a baseline). `uniform`: every token in the high tier.
    `streaming`: sinks and the recent window only. `snapkv`: the tokens that the last queries of a
    prompt attend to most, in 16 bit ([SnapKV](https://arxiv.org/abs/2404.14469), a baseline).
    `lossless`: nothing is lost, nothing saved. Or the name of
    [another package's](policies.md#a-policy-of-your-own)"""
    sink: Annotated[
        int, Field(ge=0, le=PAGE_TOKENS), Allowed(f"a whole number of tokens, 0 to {PAGE_TOKENS}")
    ] = 4
    """first tokens of a sequence, 0 to 64, which always stay in the high tier"""
    tiers: Annotated[
        Tiers, Allowed(f'{{"high": FORMAT, "low": FORMAT}}, each one of {", ".join(FORMATS)}')
    ] = Tiers()
    """formats: `raw`, `K8V8`, `K8V4`, `K4V8`, `K4V4`, `K4V2`, `K2V2`"""
    layer_caps: Annotated[
        _Share | tuple[_Share, ...] | None,
        Allowed("a share above 0 and up to 1, a list of them with one per layer, or null"),
    ] = None
    """most that a page of a layer may take, as a share of all-high; one number, or one per layer.
    `snapkv` needs it, below 1: the share of tokens that each head keeps"""
    demote: Annotated[bool, Allowed("true or false")] = True
    """under memory pressure, cold cached pages lose their high tier, then the tail of their low
    one, before prefixes are evicted (`diffxkv` and `diffkv`); `false`: what is sealed stays as it
    is until it is evicted"""
