# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's quantized caches, on a GGUF file and against its own cache in f16.

It quantizes every token as it comes: also those of the window and of the continuation, and the
prefill reads what it has quantized.

    python -m bench.accuracy.peers.llama GGUF SAMPLES TOKEN_BYTES
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from llama_cpp import GGML_TYPE_F16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, Llama

from bench.accuracy.peers.say import say
from bench.accuracy.real_models.protocol import Answer, Sample, measure, read_samples


class _Cache(NamedTuple):
    """A cache type of llama.cpp, and the bytes of a block of 32 elements in it."""

    name: str
    kind: int
    block_bytes: int


CACHES = (
    _Cache("llama.cpp q8_0", GGML_TYPE_Q8_0, 34),
    _Cache("llama.cpp q4_0", GGML_TYPE_Q4_0, 18),
)


def answers(gguf: Path, sample: Sample, token_bytes: int) -> Iterator[tuple[str, None, Answer]]:
    """Of each of `CACHES`; `token_bytes`: of a token's keys and values in 16 bit."""
    asked = [cache for cache in CACHES if sample.wants(cache.name, None)]
    if not asked:
        return
    full = _log_probabilities(gguf, sample, GGML_TYPE_F16)
    for cache in asked:
        found = _log_probabilities(gguf, sample, cache.kind)
        nbytes = sample.compressed * token_bytes * cache.block_bytes / 64
        yield cache.name, None, measure(full, found, sample, nbytes)


def _log_probabilities(gguf: Path, sample: Sample, kind: int) -> torch.Tensor:
    """After each token of the continuation: fp32 [T, V]."""
    model = Llama(
        str(gguf),
        n_ctx=len(sample.ids),
        type_k=kind,
        type_v=kind,
        flash_attn=True,
        logits_all=True,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        verbose=False,
    )
    model.eval(sample.ids)
    logits = torch.from_numpy(model.scores[sample.prefilled : len(sample.ids)])
    found = logits.log_softmax(-1)
    model.close()
    return found


def main(gguf: str, samples: str, token_bytes: str) -> None:
    for sample in read_samples(Path(samples)):
        for answer in answers(Path(gguf), sample, int(token_bytes)):
            say(sample, ["llama-cpp-python"], *answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
