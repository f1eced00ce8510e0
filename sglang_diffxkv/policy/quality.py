# SPDX-License-Identifier: Apache-2.0
"""Quality that a request asks for: how much of its KV is to survive sealing.

A request says it in SGLang's ``custom_params``: ``{"diffxkv": {"quality": "high"}}``. Other keys of
``custom_params`` belong to custom logit processors and are left alone.
"""

import difflib
import reprlib
from collections.abc import Iterable
from enum import IntEnum

from sglang_diffxkv.policy.base import TierPolicy

_PARAM = "custom_params.diffxkv"
_EXAMPLE = '{"quality": "high"}'


class Quality(IntEnum):
    """Levels, by their names in ``custom_params``; a page keeps its request's as this number."""

    BALANCED = 0
    """What the server is configured for; the default, so its number is that of a fresh page."""
    LOSSLESS = 1
    HIGH = 2
    SMALL = 3


_LEVELS = {
    level.name.lower(): level
    for level in (Quality.LOSSLESS, Quality.HIGH, Quality.BALANCED, Quality.SMALL)
}


class QualityError(ValueError):
    """A request that cannot be served; its text is one line that says what is allowed."""


def requested_quality(custom_params: object, policy: type[TierPolicy]) -> Quality:
    """Quality that a request's ``custom_params`` ask for under ``policy``; balanced without any.

    Raises:
        QualityError: an unknown key, a wrong type, an unknown level or one that ``policy`` has not.
    """
    if not isinstance(custom_params, dict) or "diffxkv" not in custom_params:
        return Quality.BALANCED
    given = custom_params["diffxkv"]
    if not isinstance(given, dict):
        raise QualityError(
            f"{_PARAM} = {reprlib.repr(given)} is not allowed; expected an object such as "
            f"{_EXAMPLE}"
        )
    for key in given:
        if key != "quality":
            hint = _near(key, ["quality"]) or "known keys: quality"
            raise QualityError(f"{_PARAM}: unknown key {reprlib.repr(key)}; {hint}")
    return _level(given.get("quality", "balanced"), policy)


def _level(name: object, policy: type[TierPolicy]) -> Quality:
    level = _LEVELS.get(name) if isinstance(name, str) else None
    if level is None:
        hint = " ".join(filter(None, [_near(name, _LEVELS), f"one of: {', '.join(_LEVELS)}"]))
        raise QualityError(f"{_PARAM}.quality = {reprlib.repr(name)} is not allowed; {hint}")
    if level in (Quality.HIGH, Quality.SMALL) and not policy.grades_quality:
        raise QualityError(
            f"{_PARAM}.quality = {name!r} needs policy 'diffxkv'; this server runs policy "
            f"{policy.name!r}, which serves: lossless, balanced"
        )
    if level is Quality.LOSSLESS and policy.is_lossless:
        return Quality.BALANCED  # which loses nothing, so the two may share pages
    return level


def _near(word: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""
