# SPDX-License-Identifier: Apache-2.0
"""User configuration: one frozen, validated dataclass, from JSON text, a JSON file or defaults.

A field's description says what it allows: it is the text that a user reads when a value is refused.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ByteSize, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, TierFormat

ENV_VAR = "DIFFXKV_CONFIG"
RANK = "{rank}"
"""In paths of plans: the number of the tensor-parallel rank, from 0."""
_CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Format = Annotated[str, Field(pattern=f"^({'|'.join(FORMATS)})$")]
_Share = Annotated[float, Field(gt=0, le=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is one line that says what is allowed."""


@dataclass(frozen=True, config=_CHECKED)
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


@dataclass(frozen=True, config=_CHECKED)
class DiffXKVConfig:
    """Everything a user can set; `load_config` reads it, `to_json` writes what it reads.

    Constructing one with a wrong value raises pydantic's ValidationError, a ValueError.
    """

    policy: Annotated[str, Field(description="the name of a policy")] = "diffxkv"
    target: Annotated[
        float | None,
        Field(
            gt=0,
            description="a retention of importance below 1, such as 0.95, or a compression above "
            "1, such as 4, or null",
        ),
    ] = None
    plan: Annotated[
        str | None,
        Field(description="the path of a plan that `sglang-diffxkv calibrate` wrote, or null"),
    ] = None
    save_plan: Annotated[str | None, Field(description="a path to write plans to, or null")] = None
    learn_share: Annotated[float, Field(ge=0, le=1, description="a share from 0 to 1")] = 0.1
    high_layers: Annotated[
        tuple[int, ...],
        Field(description="a list of layers that stay high, negative from the last, such as [0]"),
    ] = ()
    memory_bytes: Annotated[
        ByteSize | None,
        Field(gt=0, description='a positive number of bytes, such as 2000000 or "512MiB", or null'),
    ] = None
    window: Annotated[
        int, Field(ge=0, description="a whole number of recent tokens kept raw, at least 0")
    ] = 64
    sink: Annotated[
        int,
        Field(ge=0, le=PAGE_TOKENS, description=f"a whole number of tokens, 0 to {PAGE_TOKENS}"),
    ] = 4
    alpha_high: Annotated[
        float, Field(ge=0, description="a number, at least 0 and at least alpha_low")
    ] = 1.0
    alpha_low: Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")] = 0.02
    tiers: Annotated[
        Tiers,
        Field(description=f'{{"high": FORMAT, "low": FORMAT}}, each one of {", ".join(FORMATS)}'),
    ] = Tiers()
    layer_caps: Annotated[
        _Share | tuple[_Share, ...] | None,
        Field(
            description="a share above 0 and up to 1, a list of them with one per layer, or null"
        ),
    ] = None
    raw_share: Annotated[
        float, Field(gt=0, le=0.9, description="a share above 0 and up to 0.9")
    ] = 0.2
    score_queries: Annotated[
        int, Field(ge=1, description="a whole number of queries, at least 1")
    ] = 64
    demote: Annotated[bool, Field(description="true or false")] = True

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target == 1:
            raise ValueError(f"target = 1.0 is not allowed; expected {_described('target')}")
        return self

    @model_validator(mode="after")
    def _check_alphas(self) -> Self:
        if self.alpha_high < self.alpha_low:
            raise ValueError(
                f"alpha_high ({self.alpha_high:g}) must be at least alpha_low ({self.alpha_low:g})"
            )
        return self

    def of_rank(self, rank: int, ranks: int) -> Self:
        """The configuration of one of several tensor-parallel ranks.

        Raises:
            ConfigError: they would share the file of a plan, which is of a rank's own KV heads.
        """
        paths = {key: getattr(self, key) for key in ("plan", "save_plan")}
        for key, path in paths.items():
            if ranks > 1 and path is not None and RANK not in path:
                raise ConfigError(
                    f"{key} = {path!r} is not allowed with {ranks} ranks, each of which has a plan "
                    f"of its own KV heads; put {RANK} into it, such as 'plan-{RANK}.json'"
                )
        own = {key: path and path.replace(RANK, str(rank)) for key, path in paths.items()}
        return replace(self, **own)

    def to_json(self) -> str:
        """JSON text that `load_config` turns into an equal configuration."""
        return _ADAPTER.dump_json(self).decode()


_ADAPTER = TypeAdapter(DiffXKVConfig)


def load_config(text_or_path: str | None, env: Mapping[str, str]) -> DiffXKVConfig:
    """Configuration from the flag's value, else from `DIFFXKV_CONFIG`, else the defaults.

    Args:
        text_or_path: value of `--diffxkv-config`: JSON text or the path of a JSON file; None where
            the flag was not given.
        env: the environment, such as `os.environ`.

    Raises:
        ConfigError: no such file, not JSON, an unknown key, a wrong type or a value out of range.
    """
    origin, source = "--diffxkv-config", text_or_path
    if source is None:
        origin, source = ENV_VAR, env.get(ENV_VAR) or None
    if source is None:
        return DiffXKVConfig()
    try:
        return _ADAPTER.validate_json(_read(origin, source))
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(error.errors()[0])}") from None


def _read(origin: str, text_or_path: str) -> str:
    if text_or_path.lstrip().startswith("{"):
        return text_or_path
    try:
        return Path(text_or_path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(
            f"{origin}: {text_or_path!r} is neither JSON text (it does not start with '{{') "
            f"nor a file that can be read: {reason}"
        ) from None


def _explain(error: ErrorDetails) -> str:
    """One line for one of pydantic's errors: the key, the value, what is allowed."""
    loc, kind = error["loc"], error["type"]
    if kind == "json_invalid":
        return f"not valid JSON: {error['ctx']['error']}"
    if kind == "unexpected_keyword_argument":
        return _unknown_key(str(loc[-1]), Tiers if len(loc) > 1 else DiffXKVConfig)
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if not loc:
        return 'expected a JSON object such as {"policy": "diffxkv"}'
    key = str(loc[0])
    shown = repr(error["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    name = f"{key}.{loc[1]}" if key == "tiers" and len(loc) > 1 else key
    return f"{name} = {shown} is not allowed; expected {_described(key)}"


def _described(key: str) -> str:
    schema: dict[str, Any] = _ADAPTER.json_schema()["properties"][key]
    return str(schema["description"])


def _unknown_key(key: str, owner: type) -> str:
    known = [field.name for field in fields(owner)]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"
