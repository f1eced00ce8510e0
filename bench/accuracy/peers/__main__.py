# SPDX-License-Identifier: Apache-2.0
"""Ask the peers; `bench.accuracy.real_models` starts this where `bench/accuracy/peers.txt` is
installed.

    python -m bench.accuracy.peers MODEL SAMPLES
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from bench.accuracy.peers.presses import QUANTIZED, press_methods, pressed
from bench.accuracy.peers.quantized import SETTINGS, quantized
from bench.accuracy.peers.say import say
from bench.accuracy.real_models.protocol import TARGETS, Answer, Sample, measure, read_samples
from bench.accuracy.real_models.reader import LayerPrefix, Reader

PACKAGES = ("torch", "transformers", "optimum-quanto", "hqq", "kvpress")


def answers(reader: Reader, sample: Sample) -> Iterator[tuple[str, float | None, Answer]]:
    states = reader.prefill(sample.before)
    everything = [LayerPrefix(*pair) for pair in zip(states.keys, states.values, strict=True)]
    full = reader.log_probabilities(sample.after, sample.prefilled, everything)
    codes = list(quantized(states, reader.model.config))
    (beneath,) = (one for one in codes if one.name == QUANTIZED)
    for one in chain(codes, pressed(reader, sample.before, states, beneath, TARGETS)):
        if not sample.wants(one.name, one.target):
            continue
        found = reader.log_probabilities(sample.after, sample.prefilled, one.prefix)
        yield one.name, one.target, measure(full, found, sample, one.nbytes)


def main(model: str, samples: str) -> None:
    reader = Reader(Path(model))
    methods = [(setting.name, None) for setting in SETTINGS] + press_methods(TARGETS)
    for sample in read_samples(Path(samples)):
        if not any(sample.wants(*method) for method in methods):
            continue
        for answer in answers(reader, sample):
            say(sample, PACKAGES, *answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
