# SPDX-License-Identifier: Apache-2.0
"""A chain of assignments: each hop must be found before the next can be."""

from random import Random
from string import ascii_uppercase

from sglang_diffxkv.eval.tasks.base import Sample, Scene, hide
from sglang_diffxkv.eval.tasks.english.base import VT_TOKENS, document, question

_HOPS = 4


def vt(scene: Scene) -> Sample:
    """RULER's variable tracking: name all variables that a value has reached."""
    names = _names(scene.rng)
    value = scene.rng.randrange(10_000, 100_000)
    first, *hops = names
    chain = [f"VAR {first} = {value}."]
    chain += [f"VAR {name} = VAR {last}." for last, name in zip(names, hops, strict=False)]
    asked = question(
        f"Which variables in the text have the value {value}, directly or through others?",
        f"By the assignments in the text, {len(names)} variables have the value {value}:",
        names,
        VT_TOKENS,
    )
    instruction = (
        "Variables are assigned in the following text. Memorize the chain of assignments: "
        "I will ask for it later."
    )
    return document(instruction, hide(scene, chain), [asked])


def _names(rng: Random) -> list[str]:
    names: dict[str, None] = {}
    while len(names) <= _HOPS:
        names["".join(rng.choices(ascii_uppercase, k=5))] = None
    return list(names)
