# SPDX-License-Identifier: Apache-2.0
"""Chains of assignments: each hop must be found before the next can be."""

from sglang_diffxkv.eval.tasks.base import Question, Sample, Scene, hide, pick
from sglang_diffxkv.eval.tasks.words import WORDS

_HOPS = 3
_TOKENS_PER_CHAIN = 128
"""Of the context: one chain takes 15, the rest is filler."""


def vt(scene: Scene) -> Sample:
    """RULER's variable tracking: name all that a value has been copied to."""
    count = max(1, scene.budget // _TOKENS_PER_CHAIN)
    count = min(count, len(WORDS) // (_HOPS + 1))
    words = scene.rng.sample(WORDS, count * (_HOPS + 1))
    chains = [words[i::count] for i in range(count)]
    # Hop by hop, so that a chain's hops come in order, apart from one another.
    hops = [f"Copy {chain[i]} to {chain[i + 1]}." for i in range(_HOPS) for chain in chains]
    follow = {chain[0]: tuple(chain[1:]) for chain in chains}
    questions = [
        Question(f"Follow the copies of {start}?", " ".join(follow[start]), follow[start])
        for start in pick(scene, list(follow))
    ]
    return Sample((("user", hide(scene, hops)),), tuple(questions))
