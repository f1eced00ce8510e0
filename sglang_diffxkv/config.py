# SPDX-License-Identifier: Apache-2.0
"""User configuration: one frozen, validated dataclass, from JSON text, a JSON file or defaults."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Self

from pydantic import ByteSize, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from sglang_diffxkv.policy.budgeting.learner import PlanSettings
from sglang_diffxkv.policy.methods.diffkv import ThresholdSettings
from sglang_diffxkv.policy.settings import CHECKED, Allowed, ConfigError, Tiers

ENV_VAR = "DIFFXKV_CONFIG"


@dataclass(frozen=True, config=CHECKED)
class DiffXKVConfig(ThresholdSettings, PlanSettings):
    """Settings of the pool, beside those of the policies: everything that a user can set.

    `load_config` reads it, `to_json` writes what it reads; the settings of policies are flat in it.
    Constructing one with a wrong value raises pydantic's ValidationError, a ValueError.
    """

    memory_bytes: Annotated[
        ByteSize | None,
        Field(gt=0),
        Allowed('a positive number of bytes, such as 2000000 or "512MiB", or null'),
    ] = None
    """everything the pool owns on a rank: raw pages, frames, tables; a number, or text such as
    `"512MiB"`. `null`: what `--mem-fraction-static` would give SGLang's own pool; on a CPU, unless
    that flag is given, a quarter of the memory that the host or container has available, divided by
    its ranks"""
    host_bytes: Annotated[
        ByteSize,
        Field(ge=0),
        Allowed('a number of bytes, 0 or more, such as "64GiB"'),
    ] = ByteSize(0)
    """host memory, on a rank, for pages that nobody reads: they go there before anything is demoted
    or evicted, and come back when a prompt begins with them. On a GPU it is pinned. 0: none"""
    disk_path: Annotated[str | None, Allowed("the path of a folder, or null")] = None
    """folder to which sealed pages are written, too, and in which a server that starts finds those
    of an earlier one; needs `host_bytes`, through which they come back. `null`: none"""
    disk_bytes: Annotated[
        ByteSize | None,
        Field(gt=0),
        Allowed('a positive number of bytes, such as "200GiB", or null'),
    ] = None
    """how much of the disk, on a rank; needed with `disk_path`"""
    window: Annotated[
        int, Field(ge=0), Allowed("a whole number of recent tokens kept raw, at least 0")
    ] = 64
    """recent tokens of a running request that stay uncompressed while there are raw pages for them;
    under pressure they are sealed before a request is turned away"""
    raw_share: Annotated[float, Field(gt=0, le=0.9), Allowed("a share above 0 and up to 0.9")] = 0.2
    """share of the memory for uncompressed pages, up to 0.9"""
    score_queries: Annotated[int, Field(ge=1), Allowed("a whole number of queries, at least 1")] = (
        64
    )
    """queries per prefill chunk that score the tokens before them: with `diffxkv` half from the
    chunk's end and half strided over the rest, with `diffkv` strided over all, with `snapkv` and
    `xkv` the last ones"""

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if self.disk_path is not None and not self.host_bytes:
            raise ValueError("disk_path needs host_bytes: pages come back through host memory")
        if (self.disk_path is None) != (self.disk_bytes is None):
            raise ValueError("disk_path and disk_bytes need each other: give both, or neither")
        return self

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
    metadata = DiffXKVConfig.__pydantic_fields__[key].metadata  # type: ignore[attr-defined]
    return next(found.text for found in metadata if isinstance(found, Allowed))


def _unknown_key(key: str, owner: type) -> str:
    known = [field.name for field in fields(owner)]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"
