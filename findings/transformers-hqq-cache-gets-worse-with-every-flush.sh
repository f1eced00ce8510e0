#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# transformers' QuantizedCache quantizes its whole history again whenever the residual is full. With
# the HQQ backend and the default axes a group has elements of all heads, of tokens from end to end and
# of all sequences in the batch, so the groups are others each time: the error of the first tokens
# grows with every flush, and what a sequence reads back depends on its neighbours. With axis 1, and
# with quanto, groups stay the same, and so do the errors.
# Needs uv and Python 3.11; runs on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv venv --quiet --python 3.11 "$work/env"
VIRTUAL_ENV=$work/env uv pip install --quiet transformers==5.19.0 hqq==0.2.8.post1 \
    optimum-quanto==0.2.7 torch==2.14.1
cat >"$work/show.py" <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import LlamaConfig, QuantizedCache

for name in ("transformers", "hqq", "optimum-quanto", "torch"):
    print(name, version(name))
CONFIG = LlamaConfig(num_hidden_layers=1)
PROMPT, GENERATED, HEADS, DIM = 256, 2048, 4, 64
SCALES = torch.linspace(0.2, 3, DIM)  # channels differ, as those of keys do


def states(sequences: int, tokens: int) -> torch.Tensor:
    return torch.randn(sequences, HEADS, tokens, DIM) * SCALES


def first(cache: QuantizedCache) -> torch.Tensor:
    """Keys of the first sequence's prompt, as they are read back."""
    layer = cache.layers[0]
    return layer._dequantize(layer._quantized_keys)[0, :, :PROMPT]


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


torch.manual_seed(0)
prompt, generated = states(2, PROMPT), states(1, GENERATED)
for backend, axis in (("hqq", 0), ("hqq", 1), ("quanto", 0)):
    alone, batched = (QuantizedCache(backend, CONFIG, 4, axis, axis) for _ in range(2))
    alone.update(prompt[:1], prompt[:1], 0)
    batched.update(prompt, prompt, 0)
    crossed = distance(first(batched), first(alone))
    before = distance(first(alone), prompt[0])
    for token in generated.split(1, 2):
        alone.update(token, token, 0)
    after = distance(first(alone), prompt[0])
    print(f"{backend} int4, axis {axis}{' (default)' if axis == 0 else ''}:")
    print(f"  error of the prompt's keys: {before:.3f}; {GENERATED} tokens later: {after:.3f}")
    print(f"  with another sequence in the batch they differ by {crossed:.3f}")
    drifts = (backend, axis) == ("hqq", 0)
    assert (after > 2 * before) == drifts and (crossed > 0.05) == drifts, "the behaviour has changed"
PYTHON
"$work/env/bin/python" -P "$work/show.py" 2>&1 | grep -v -i -E "warn|CUDA runtime"
