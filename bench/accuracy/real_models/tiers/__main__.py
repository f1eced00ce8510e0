# SPDX-License-Identifier: Apache-2.0
"""What better importances, a third tier, and learnt bases are worth: KL of a real model.

Simulated: no page is sealed. `choices` asks the code itself.

    python -m bench.accuracy.real_models.tiers MODEL [--documents 4]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from bench.accuracy.real_models.__main__ import make_samples
from bench.accuracy.real_models.reader import Reader
from bench.accuracy.real_models.tiers.bases import Basis, hadamard_basis, learnt, read
from bench.accuracy.real_models.tiers.oracle import REQUEST
from bench.accuracy.real_models.tiers.simulated import Answer, Case, Document
from bench.serving.common import table, write_results
from sglang_diffxkv.kernels.layout import FORMATS, TierFormat

LENGTHS = (1024, 2048, 3072)
LEARNT_FROM = 2
"""Documents after the measured ones, from whose states bases are learnt."""
TARGETS = (4.0, 6.0, 8.0)
TODAY = ("K8V4", "K4V2")
LOSS = {"K8V4": 0.0002, "K4V4": 0.0015, "K4V2": 0.005, "K2V2": 0.05}
"""Of a token in a format, in shares of what pruning it does: about the KL of all tokens in it."""
UNIFORM = (FORMATS["K8V4"], FORMATS["K4V4"], FORMATS["K4V2"], TierFormat("K2V4", 2, 4),
           FORMATS["K2V2"])  # fmt: skip
IMPORTANCES, SETS, LOSSES, BASES = "importances", "sets of tiers", "losses", "bases"


class Finding(NamedTuple):
    """A cell of a table, of one document."""

    table: str
    row: str
    column: str
    document: str
    answer: Answer


def cases(importances: Sequence[str]) -> Iterator[tuple[str, str, Case]]:
    """Table, row and case: today's tiers by every importance, all others by the last of them."""
    for name in importances:
        yield IMPORTANCES, name, _case(name, TODAY)
    best = importances[-1]
    for tiers in (
        TODAY,
        ("K8V4", "K4V4", "K4V2"),
        ("K8V4", "K4V2", "K2V2"),
        ("K8V4", "K4V4", "K4V2", "K2V2"),
        ("K8V4", "K2V2"),
        ("K4V4", "K2V2"),
        ("K4V4", "K4V2", "K2V2"),
    ):
        yield SETS, ", ".join(tiers), _case(best, tiers)
    for tier, losses, tiers in (
        ("K4V2", (0.002, 0.01), TODAY),
        ("K4V4", (0.0007, 0.003), ("K8V4", "K4V4", "K4V2")),
        ("K2V2", (0.02, 0.1), ("K8V4", "K4V2", "K2V2")),
    ):
        for loss in losses:
            row = f"{', '.join(tiers)}; {tier} {loss:g}"
            yield LOSSES, row, _case(best, tiers, **{tier: loss})


def _case(importance: str, tiers: Sequence[str], **changed: float) -> Case:
    loss = LOSS | changed
    return Case(importance, tuple(FORMATS[x] for x in tiers), tuple(loss[x] for x in tiers))


def ask(document: Document, bases: Mapping[str, Basis]) -> Iterator[Finding]:
    """Everything that is asked of a document."""
    for kind, row, case in cases(list(document.importances)):
        reads = read(document.states, hadamard_basis(document.states), case.tiers)
        for target in TARGETS:
            answer = document.ask(case, target, reads)
            yield Finding(kind, row, f"{target:g}×", document.name, answer)
    for name, basis in bases.items():
        reads = read(document.states, basis, UNIFORM)
        for tier in UNIFORM:
            answer = document.ask_uniform(tier, reads)
            yield Finding(BASES, name, tier.name, document.name, answer)


def report(findings: Sequence[Finding], documents: int) -> str:
    lengths = ", ".join(f"{length:,}" for length in LENGTHS)
    losses = ", ".join(f"{name} {loss:g}" for name, loss in LOSS.items())
    return f"""\
Mean KL from full KV of the next 256 tokens, nats: {documents} documents of {lengths} tokens,
in turns, as in [real_models.md](real_models.md). The first half is compressed but for its last 64
tokens.

Tiers are chosen for the least sum of importance × loss within the bytes, which are those of tokens
and their metadata: no frames, no tables. The first four tokens are in the best tier. Losses, in
shares of pruning: {losses}.

## Importances, with {" and ".join(TODAY)}

Attention is in units of uniform attention. Rereading: that of the queries of a second reading.

{_pivot(findings, IMPORTANCES)}

## Sets of tiers, beside pruning, by the mean square of the rereading's attention

Without K8V4 the first four tokens are in K4V4.

{_pivot(findings, SETS)}

With the loss of one of them changed:

{_pivot(findings, LOSSES)}

## Bases, all tokens but the first four in one format

Learnt from the states of {LEARNT_FROM} other documents, per layer and KV head; the side that is not
named is in Hadamard's. OSCAR: eigenvectors of the queries' second moments, and of those of the
values, weighted by how much queries look for their keys. Balanced: keys and queries get the same
covariance.

{_pivot(findings, BASES)}"""


def _pivot(findings: Sequence[Finding], name: str) -> str:
    """Markdown of the mean KL of each cell of a table."""
    cells: dict[str, dict[str, list[float]]] = {}
    for finding in findings:
        if finding.table == name:
            row = cells.setdefault(finding.row, {})
            row.setdefault(finding.column, []).append(finding.answer.kl)
    head = ["", *next(iter(cells.values()))]
    body = [[row, *(f"{fmean(x):.2g}" for x in by.values())] for row, by in cells.items()]
    return table([head, *body])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--documents", type=int, default=4)
    options = parser.parse_args()
    reader = Reader(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    request = torch.tensor(tokenizer(REQUEST, add_special_tokens=False).input_ids)
    samples = make_samples(options.model, options.documents + LEARNT_FROM, LENGTHS)
    measured, others = samples[: options.documents], samples[options.documents :]
    bases = learnt([reader.prefill(sample.before) for sample in others])
    findings = [
        finding
        for sample in tqdm(measured, "documents")
        for finding in ask(Document(reader, sample, request), bases)
    ]
    rows = [x._asdict() | {"answer": x.answer._asdict()} for x in findings]
    title = f"{options.model.name}: importances, sets of tiers, and bases"
    text = report(findings, options.documents)
    write_results("real_models_tiers", title, {"rows": rows}, text)


if __name__ == "__main__":
    main()
