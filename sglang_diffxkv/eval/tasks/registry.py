# SPDX-License-Identifier: Apache-2.0
"""Tasks by name, in the language that a model understands."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.eval.tasks.base import Filler, Maker
from sglang_diffxkv.eval.tasks.copying import copy
from sglang_diffxkv.eval.tasks.counting import cwe, fwe
from sglang_diffxkv.eval.tasks.english import copying, counting, needles, tracking
from sglang_diffxkv.eval.tasks.english import recall as chat
from sglang_diffxkv.eval.tasks.fillers import FILLERS
from sglang_diffxkv.eval.tasks.recall import recall
from sglang_diffxkv.eval.tasks.records import record, records
from sglang_diffxkv.eval.tasks.retrieval import (
    kv_lookup,
    niah_multikey,
    niah_multiquery,
    niah_single,
)
from sglang_diffxkv.eval.tasks.tracking import vt
from sglang_diffxkv.eval.tasks.words import HELD_OUT

_MAKERS: tuple[tuple[Maker, Maker], ...] = (
    (niah_single, needles.niah_single),
    (niah_multikey, needles.niah_multikey),
    (niah_multiquery, needles.niah_multiquery),
    (kv_lookup, needles.kv_lookup),
    (vt, tracking.vt),
    (cwe, counting.cwe),
    (fwe, counting.fwe),
    (copy, copying.copy),
    (recall, chat.recall),
    (record, copying.record),
    (records, copying.records),
)
TASKS = {maker.__name__: maker for maker, _ in _MAKERS}
"""In the language that the bundled model was trained on, and the only one it knows."""
ENGLISH_TASKS = {maker.__name__: english for maker, english in _MAKERS}
"""The same in plain English."""


class Suite(NamedTuple):
    """What a model is asked."""

    tasks: Mapping[str, Maker]
    filler: Filler


BUNDLED_SUITE = Suite(TASKS, HELD_OUT)


def default_filler(model: Path) -> str:
    """Name of the filler that suits `model`."""
    return "words" if is_bundled(model) else "documentation"


def choose_suite(model: Path, filler: str | None = None) -> Suite:
    """Tasks that `model` understands, in the text `filler`; None: the one that suits it.

    Raises:
        ConfigError: the bundled model is to read more than words.
    """
    filler = filler or default_filler(model)
    if not is_bundled(model):
        return Suite(ENGLISH_TASKS, FILLERS[filler])
    if filler != "words":
        raise ConfigError(f"the bundled model reads no {filler}: it knows the filler words alone")
    return BUNDLED_SUITE


def is_bundled(model: Path) -> bool:
    """Whether it is the model that was trained on the language of `TASKS`."""
    return model.resolve() == BUNDLED.resolve()


class Shared(NamedTuple):
    """One document, many questions: which task writes it, and how its pages are filled."""

    of: str
    recomputed: bool
    """Whether each question comes with its own pages, scored by itself, instead of those that were
    sealed while another question was answered."""


SHARED_TASKS = {
    "shared_prefix": Shared("niah_multikey", recomputed=False),
    "recomputed_prefix": Shared("niah_multikey", recomputed=True),
}
NAMES = (*TASKS, *SHARED_TASKS)
