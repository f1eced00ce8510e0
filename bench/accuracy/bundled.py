# SPDX-License-Identifier: Apache-2.0
"""What benches ask the bundled model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.eval.model import Model, load_model
from sglang_diffxkv.eval.questions.prompts import make_cells


class Asked(NamedTuple):
    """Options of the command line, the model, and its prompts, a cell for each task."""

    options: argparse.Namespace
    model: Model
    cells: Sequence[Any]


def parse(description: str, tasks: Sequence[str]) -> Asked:
    """Read --samples and --length; make the prompts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--samples", type=int, default=25, help="prompts of each task")
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    model = load_model(BUNDLED)
    cells = make_cells(model.tokenizer, tasks, [options.length], options.samples, seed=1)
    return Asked(options, model, cells)
