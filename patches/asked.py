# SPDX-License-Identifier: Apache-2.0
"""The quality that a request asks for, where requests say it.

In SGLang's ``custom_params``, ``{"diffxkv": {"quality": "high"}}``, whose other keys belong to
custom logit processors and are left alone; in a header; or, where a router lets neither through, at
the end of the model's name. Where it is said twice the two must agree.
"""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.registry import POLICIES

HEADER = "X-DiffXKV-Quality"

_KEY = "diffxkv"
_PARAM = f"custom_params.{_KEY}"
_EXAMPLE = '{"quality": "high"}'
_LOOKS_ALIKE = 0.8
_LEVELS = {
    level.name.lower(): level
    for level in (Quality.LOSSLESS, Quality.HIGH, Quality.BALANCED, Quality.SMALL)
}


class QualityError(ValueError):
    """A request that cannot be served; its text is one line that says what is allowed."""


class Asked(NamedTuple):
    """A quality that a request asks for, in so many words."""

    level: str
    """One of the levels that the server's policy has."""
    where: str
    """Where the request says it, for messages."""


def asked_in_params(custom_params: object, policy: type[TierPolicy]) -> Asked | None:
    """What a request's ``custom_params`` ask for under ``policy``.

    Raises:
        QualityError: an unknown key, a wrong type, an unknown level or one that ``policy`` has not.
    """
    if not isinstance(custom_params, Mapping) or _KEY not in custom_params:
        return None
    given = custom_params[_KEY]
    if not isinstance(given, Mapping):
        raise QualityError(
            f"{_PARAM} = {reprlib.repr(given)} is not allowed; expected an object such as "
            f"{_EXAMPLE}"
        )
    for key in given:
        if key != "quality":
            hint = _near(key, ["quality"]) or "known keys: quality"
            raise QualityError(f"{_PARAM}: unknown key {reprlib.repr(key)}; {hint}")
    if "quality" not in given:
        return None
    return _checked(given["quality"], f"{_PARAM}.quality", policy)


def asked_in_headers(headers: Iterable[tuple[str, str]], policy: type[TierPolicy]) -> Asked | None:
    """What a request's headers, as pairs of name and value, ask for under ``policy``.

    Raises:
        QualityError: a level as above, two that differ, or a name like that of our header.
    """
    asked = None
    for name, value in headers:
        if name.lower() == HEADER.lower():
            asked = agreed(asked, _checked(value.strip(), HEADER, policy))
        elif _is_meant(name.lower()):
            raise QualityError(f"unknown header {reprlib.repr(name)}; did you mean {HEADER!r}?")
    return asked


def asked_in_model(model: str, policy: type[TierPolicy]) -> tuple[str, Asked | None]:
    """The model's name without its last part, ``:diffxkv=LEVEL``, and what that asks for.

    Raises:
        QualityError: a level as above, or a last part like ours.
    """
    name, *parts = model.split(":")
    *others, last = parts or [""]
    key, equals, level = last.partition("=")
    ours = key == _KEY and bool(equals)
    for part in others if ours else parts:
        if difflib.get_close_matches(part.partition("=")[0].lower(), [_KEY], cutoff=_LOOKS_ALIKE):
            raise QualityError(
                f"model: unknown part {reprlib.repr(part)}; did you mean ':{_KEY}=…' at its end?"
            )
    if not ours:
        return model, None
    return ":".join([name, *others]), _checked(level, f"model ':{_KEY}'", policy)


def agreed(*asked: Asked | None) -> Asked | None:
    """What all of ``asked`` that is anything says; None where none is.

    Raises:
        QualityError: two of them say different things.
    """
    said = [each for each in asked if each is not None]
    for other in said[1:]:
        if other.level != said[0].level:
            first = said[0]
            raise QualityError(
                f"{first.where} = {first.level!r} and {other.where} = {other.level!r} do not agree"
            )
    return said[0] if said else None


def with_quality(custom_params: object, asked: Asked) -> dict[str, object]:
    """``custom_params`` that ask for it, and are otherwise as they were."""
    others = custom_params if isinstance(custom_params, Mapping) else {}
    return {**others, _KEY: {"quality": asked.level}}


def requested_quality(custom_params: object, policy: type[TierPolicy]) -> Quality:
    """Quality that a request's ``custom_params`` ask for under ``policy``; balanced without any.

    Raises:
        QualityError: as `asked_in_params`.
    """
    asked = asked_in_params(custom_params, policy)
    if asked is None:
        return Quality.BALANCED
    level = _LEVELS[asked.level]
    if level is Quality.LOSSLESS and policy.is_lossless:
        return Quality.BALANCED  # which loses nothing, so the two may share pages
    return level


def _checked(name: object, where: str, policy: type[TierPolicy]) -> Asked:
    level = _LEVELS.get(name) if isinstance(name, str) else None
    if level is None or not isinstance(name, str):
        hint = " ".join(filter(None, [_near(name, _LEVELS), f"one of: {', '.join(_LEVELS)}"]))
        raise QualityError(f"{where} = {reprlib.repr(name)} is not allowed; {hint}")
    if level in (Quality.HIGH, Quality.SMALL) and not policy.grades_quality:
        grading = " or ".join(repr(x.name) for x in POLICIES.values() if x.grades_quality)
        raise QualityError(
            f"{where} = {name!r} needs policy {grading}; this server runs policy {policy.name!r}, "
            "which serves: lossless, balanced"
        )
    return Asked(name, where)


def _is_meant(header: str) -> bool:
    """Whether a header's name, in lower case, is one that nobody but us would have."""
    if _KEY in header:
        return True
    likely = header.endswith("quality")  # the comparison below is slow
    return likely and bool(difflib.get_close_matches(header, [HEADER.lower()], cutoff=_LOOKS_ALIKE))


def _near(word: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""
