# SPDX-License-Identifier: Apache-2.0
"""What to evaluate, as a command line says it."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.eval.defaults import DOCUMENT_TASKS, TASKS
from sglang_diffxkv.eval.dtype import fast_dtype
from sglang_diffxkv.eval.tasks.registry import default_filler
from sglang_diffxkv.launch import default_device

_Number = TypeVar("_Number", int, float)


class Options(NamedTuple):
    """What to evaluate; see `sglang-diffxkv eval --help`."""

    model: Path
    policies: Sequence[str]
    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int
    seed: int
    device: str
    targets: Sequence[float]
    """Physical compressions that policies with a knob are set to; none: as configured."""
    dtype: str
    """That servers compute in, one of `ITEMSIZES`."""
    filler: str
    """Name of the text that needles are hidden in."""
    importance: Path | None = None
    """Importance model for `diffxkv`."""


def parse_options(args: argparse.Namespace) -> Options:
    """
    Raises:
        ConfigError: what nobody could evaluate.
    """
    default_tasks = TASKS if args.documents is None else DOCUMENT_TASKS
    tasks = _some("--tasks", default_tasks if args.tasks is None else args.tasks)
    lengths = _some("--lengths", args.lengths)
    _check_output(args.output)
    device = args.device or default_device()
    return Options(
        model=args.model,
        policies=names(args.policies),
        tasks=tasks,
        lengths=[_number(text, int) for text in lengths],
        samples=_number(args.samples, int),
        seed=args.seed,
        device=device,
        targets=[_number(text, float) for text in names(args.target_compression)],
        dtype=args.dtype or fast_dtype(device),
        filler=args.filler or default_filler(args.model),
        importance=_file("--importance", args.importance),
    )


def check_tasks(tasks: Sequence[str], known: Collection[str], what: str = "") -> None:
    """
    Raises:
        ConfigError: one of `tasks` is not `known`; `what` says of which kind it would be.
    """
    for task in tasks:
        if task not in known:
            raise ConfigError(f"unknown task {task!r}{what}; one of: {', '.join(known)}")


def names(text: str) -> list[str]:
    """None twice: what is measured twice would count as more samples."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _some(option: str, text: str) -> list[str]:
    found = names(text)
    if not found:
        raise ConfigError(f"{option} names nothing")
    return found


def _check_output(output: Path | None) -> None:
    """Refuse what could not be written hours later."""
    if output is None:
        return
    if output.suffix in (".md", ".png"):
        raise ConfigError(f"--output {output}: name the .json, the {output.suffix} comes beside it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from None


def _file(option: str, path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise ConfigError(f"{option} {path}: no such file")
    return path


def _number(text: str, kind: type[_Number]) -> _Number:
    with suppress(ValueError):
        value = kind(text)
        if value > 0:
            return value
    raise ConfigError(f"{text!r} is not a positive number")
