# SPDX-License-Identifier: Apache-2.0
"""Our policies and the peers, on the same model, documents and bytes, without a server.

The peers live in an environment of their own:

    uv venv peers && uv pip install --python peers/bin/python -r bench/accuracy/peers.txt
    python -m bench.accuracy.real_models MODEL --peers-python peers/bin/python --gguf MODEL.gguf

Answers are kept in `bench/results/real_models.json`: a run that was interrupted goes on where it
was, and `--again ours` asks our policies anew while the peers' answers stay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from bench.accuracy.real_models.methods import Learnt, methods, tuned
from bench.accuracy.real_models.ours import ModelShape, Sealer
from bench.accuracy.real_models.plot import plot
from bench.accuracy.real_models.protocol import (
    Answer,
    Sample,
    mean_nll,
    measure,
    write_samples,
)
from bench.accuracy.real_models.reader import LayerPrefix, Reader
from bench.accuracy.real_models.report import report
from bench.accuracy.real_models.results import (
    FAMILIES,
    LLAMA,
    OURS,
    PEERS,
    Results,
    fingerprint,
    load,
)
from bench.accuracy.real_models.tuning import Calibration
from bench.serving.common import RESULTS, write_results
from sglang_diffxkv.eval.documents.corpus import load_documents

LENGTHS = (1024, 2048, 3072, 4096)
"""Of documents in tokens, in turns; half of each is prefilled."""
AFTER = 256
"""Tokens after that, at which distributions are compared."""
BENCH = Path(__file__).parents[2]


def make_samples(model: Path, count: int, lengths: Sequence[int]) -> list[Sample]:
    """The first `count` documents of the default corpus that are long enough."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    samples: list[Sample] = []
    for document in load_documents(None):
        length = lengths[len(samples) % len(lengths)]
        ids = tokenizer(document.text, verbose=False).input_ids
        if len(samples) < count and len(ids) >= length:
            half = length // 2
            samples.append(Sample(document.name, ids[: half + min(half, AFTER)], half))
    if len(samples) < count:
        raise SystemExit(f"the corpus has {len(samples)} documents that are long enough")
    return samples


def learn(reader: Reader, tuning: Sequence[Sample], importance: Path | None) -> Learnt:
    """From documents that are not measured."""
    shape = ModelShape.of(reader.model.config)
    states = (reader.prefill(sample.before) for sample in tuning)
    return Learnt(tuned(Calibration(shape, states)), importance)


def ask_ours(
    reader: Reader,
    samples: Sequence[Sample],
    learnt: Learnt,
    results: Results,
    path: Path,
) -> None:
    """Every policy about every document, as far as there is no answer yet."""
    shape = ModelShape.of(reader.model.config)
    sealers: dict[tuple[str, float | None], Sealer] = {}
    for sample in tqdm(samples, "ours"):
        known = results.known(OURS, sample.name)
        asked = [
            method
            for method in methods(shape, sample.compressed, learnt)
            if (method.name, method.target) not in known
        ]
        if not asked:
            continue
        states = reader.prefill(sample.before)
        everything = [LayerPrefix(*pair) for pair in zip(states.keys, states.values, strict=True)]
        full = reader.log_probabilities(sample.after, sample.prefilled, everything)
        results.full[sample.name] = mean_nll(full, sample)
        for method in asked:
            key = method.name, method.target
            if key not in sealers:
                sealers[key] = Sealer(method.config, shape)
            sealed = sealers[key].seal(states, method.config.window)
            found = reader.log_probabilities(sample.after, sample.prefilled, sealed.prefix)
            answer = measure(full, found, sample, sealed.nbytes)
            results.add(OURS, *key, sample.name, answer)
        save(results, path)


def ask_peers(
    family: str, command: Sequence[object], samples: Sequence[Sample], results: Results, path: Path
) -> None:
    """The same of peers in their own environment.

    Args:
        command: Python there, a module and its arguments, where "SAMPLES" is to be filled in.
    """
    asked = [sample._replace(known=results.known(family, sample.name)) for sample in samples]
    with TemporaryDirectory() as folder:
        (Path(folder) / "bench").symlink_to(BENCH)
        file = Path(folder) / "samples.json"
        write_samples(file, asked)
        process = subprocess.Popen(
            [str(file if part == "SAMPLES" else part) for part in command],
            env=os.environ | {"PYTHONPATH": folder, "PYTHONSAFEPATH": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in tqdm(process.stdout, f"{family}, answers"):
            said = json.loads(line)
            results.packages |= said["packages"]
            answer = Answer(**said["answer"])
            results.add(family, said["name"], said["target"], said["document"], answer)
            save(results, path)
        if process.wait():
            raise SystemExit("the peers failed; what they said is above")


def save(results: Results, path: Path) -> None:
    path.write_text(json.dumps({"results": results.to_json()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="multiples of 128")
    parser.add_argument("--peers-python", type=Path, help="where bench/accuracy/peers.txt is")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp")
    parser.add_argument(
        "--importance", type=Path, help="that `sglang-diffxkv calibrate` wrote, of other texts"
    )
    parser.add_argument("--only", choices=FAMILIES, help="leave the others' answers as they are")
    parser.add_argument("--again", choices=FAMILIES, help="forget these answers first")
    parser.add_argument("--name", default="real_models", help="of the files in bench/results")
    options = parser.parse_args()
    asked = FAMILIES if options.only is None else (options.only,)
    if set(asked) != {OURS} and options.peers_python is None:
        parser.error("--peers-python is missing: see bench/accuracy/peers.txt; or --only ours")
    if LLAMA in asked and options.gguf is None:
        parser.error("--gguf is missing; or --only ours, or peers")
    path = RESULTS / f"{options.name}.json"
    lengths = options.lengths
    samples = make_samples(options.model, options.documents + len(lengths), lengths)
    samples, tuning = samples[: options.documents], samples[options.documents :]
    results = load(path, new_results(options.model, samples))
    if options.again is not None:
        results.forget(options.again)
    module = [options.peers_python, "-m"]
    if OURS in asked:
        reader = Reader(options.model)
        learnt = learn(reader, tuning, options.importance)
        results.alphas = {f"{x:g}": (c.alpha_high, c.alpha_low) for x, c in learnt.diffkv.items()}
        ask_ours(reader, samples, learnt, results, path)
    if PEERS in asked:
        command = [*module, "bench.accuracy.peers", options.model, "SAMPLES"]
        ask_peers(PEERS, command, samples, results, path)
    if LLAMA in asked:
        command = [*module, "bench.accuracy.peers.llama", options.gguf, "SAMPLES"]
        ask_peers(LLAMA, [*command, results.token_bytes], samples, results, path)
    write_results(
        options.name,
        f"{options.model.name}: our policies and the peers",
        {"results": results.to_json()},
        report(results, samples),
    )
    plot(path.with_suffix(".png"), results)


def new_results(model: Path, samples: Sequence[Sample]) -> Results:
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    return Results(
        asked={sample.name: fingerprint(model.name, sample) for sample in samples},
        token_bytes=ModelShape.of(config).token_bytes,
        tokens={sample.name: sample.compressed for sample in samples},
    )


if __name__ == "__main__":
    main()
