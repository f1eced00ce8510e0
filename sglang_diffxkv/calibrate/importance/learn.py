# SPDX-License-Identifier: Apache-2.0
"""From texts to an importance model."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from sglang_diffxkv.calibrate.importance.fit import Samples, explained, fit_importance
from sglang_diffxkv.calibrate.importance.reading import REQUEST, TextReader
from sglang_diffxkv.calibrate.importance.rotary import find_rotary
from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.eval.model import Model
from sglang_diffxkv.policy.importance.features import Rotary, features
from sglang_diffxkv.policy.importance.model import ImportanceModel

TEXT_TOKENS, LEAST_TOKENS = 1024, 128
"""Of a text, which is cut from longer ones."""
TEXTS = 64
SAMPLED = 512
"""Tokens of a text that are learnt from."""
SINKS = 4
"""First tokens of a text, which are unlike all others."""
_HELD_OUT = 8
"""One of so many texts tells how good the model is."""
_MODULES = (
    *("argparse", "asyncio.base_events", "ast", "datetime", "email.message", "inspect", "logging"),
    *("optparse", "pathlib", "pdb", "pickle", "subprocess", "tarfile", "turtle"),
)
"""Of Python's library, which is on every machine: half code, half English."""


class Learnt(NamedTuple):
    """An importance model, and how much of the variance of log T it explains on other texts."""

    model: ImportanceModel
    explained: float


def library_texts(model: Model) -> list[list[int]]:
    """Token ids of the default texts."""
    # Not imported: some need libraries that not every machine has.
    found = (find_spec(name) for name in _MODULES)
    files = (Path(spec.origin) for spec in found if spec is not None and spec.origin is not None)
    sources = (file.read_text(encoding="utf-8") for file in files if file.suffix == ".py")
    return [model.tokenizer(source, verbose=False).input_ids for source in sources]


def learn_importance(model: Model, texts: Sequence[Sequence[int]], device: str) -> Learnt:
    """An importance model from texts of token ids.

    Raises:
        ConfigError: the texts are too short or too few, or the model is one that cannot be read.
    """
    parts = _choose(list(_parts(texts)), TEXTS)
    if len(parts) < 2:
        raise ConfigError(
            f"two texts of {LEAST_TOKENS} tokens are needed at least to learn importance from"
        )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    reader = TextReader(model.path, device, dtype)
    request = torch.tensor(model.tokenizer(REQUEST, add_special_tokens=False).input_ids)
    if (context := reader.context_length) is not None:  # for the text, twice, and the request
        parts = [part[: (context - len(request)) // 2] for part in parts]
    rotary = find_rotary(reader, parts[0][:LEAST_TOKENS])
    held_out = range(0, len(parts), _HELD_OUT)
    learnt: list[Samples] = []
    other: list[Samples] = []
    for number, part in enumerate(parts):
        (other if number in held_out else learnt).append(_sample(reader, part, request, rotary))
        _say(f"{number + 1} of {len(parts)} texts")
    print(file=sys.stderr)
    del reader
    _free(device)
    found = fit_importance(_together(learnt), rotary)
    if not all(bool(tensor.isfinite().all()) for tensor in found.tensors().values()):
        raise ConfigError(f"{model.path}: importance cannot be learnt: keys that are no numbers")
    return Learnt(found, explained(found, _together(other)))


def _free(device: str) -> None:
    """What the model has taken: a server that starts next counts what memory is free."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _parts(texts: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    for ids in texts:
        for first in range(0, len(ids), TEXT_TOKENS):
            if len(part := ids[first : first + TEXT_TOKENS]) >= LEAST_TOKENS:
                yield torch.tensor(part)


def _choose(parts: list[torch.Tensor], most: int) -> list[torch.Tensor]:
    """Up to ``most``, evenly spread."""
    count = min(most, len(parts))
    return [parts[i * len(parts) // count] for i in range(count)]


def _sample(
    reader: TextReader, text: torch.Tensor, request: torch.Tensor, rotary: Rotary
) -> Samples:
    """Some tokens of a text, the same of all layers."""
    chosen = torch.randperm(len(text) - SINKS, generator=torch.Generator().manual_seed(0))
    chosen = chosen[:SAMPLED] + SINKS
    inputs, outputs = [], []
    for read in reader.read_again(text, request):
        mine = chosen.to(read.keys.device)
        inputs.append(features(read.keys[:, mine], read.values[:, mine], rotary).half().cpu())
        outputs.append(read.needed[:, mine].cpu())
    return Samples(torch.stack(inputs), torch.stack(outputs))


def _together(samples: Sequence[Samples]) -> Samples:
    return Samples(*(torch.cat(side, 2) for side in zip(*samples, strict=True)))


def _say(text: str) -> None:
    print(f"\r{text}", end="", file=sys.stderr, flush=True)
