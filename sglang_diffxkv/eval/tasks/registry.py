# SPDX-License-Identifier: Apache-2.0
"""Tasks by name."""

from typing import NamedTuple

from sglang_diffxkv.eval.tasks.base import Maker
from sglang_diffxkv.eval.tasks.copying import copy
from sglang_diffxkv.eval.tasks.counting import cwe, fwe
from sglang_diffxkv.eval.tasks.recall import recall
from sglang_diffxkv.eval.tasks.records import record, records
from sglang_diffxkv.eval.tasks.retrieval import (
    kv_lookup,
    niah_multikey,
    niah_multiquery,
    niah_single,
)
from sglang_diffxkv.eval.tasks.tracking import vt

TASKS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        niah_single,
        niah_multikey,
        niah_multiquery,
        kv_lookup,
        vt,
        cwe,
        fwe,
        copy,
        recall,
        record,
        records,
    )
}


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
