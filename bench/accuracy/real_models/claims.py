# SPDX-License-Identifier: Apache-2.0
"""The papers' claims, as `bench.accuracy.ddid` checks them on the embedded model, on real weights.

Importance differs between layers (XKV), heads and documents (DiffKV); keys need more bits than
values, and thresholds beat fixed shares, at equal bytes; retention predicts what is lost; what the
thresholds do. Judged by KL, as in `protocol`.

    python -m bench.accuracy.real_models.claims MODEL [--documents 6] [--length 1024]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from bench.accuracy.attention import QUERIES, share_needed
from bench.accuracy.real_models.__main__ import make_samples
from bench.accuracy.real_models.equal_bytes import Measured, Seal, Way, mean, report, ways
from bench.accuracy.real_models.options import parse
from bench.accuracy.real_models.ours import ModelShape, Sealer
from bench.accuracy.real_models.protocol import Sample, measure
from bench.accuracy.real_models.reader import LayerPrefix, Reader, States
from bench.accuracy.real_models.tuning import Calibration
from bench.serving.common import table, write_results
from sglang_diffxkv.config import DiffXKVConfig, Tiers
from sglang_diffxkv.eval.variants import VARIANTS

TARGET = 0.9
"""Share of importance that a layer is to keep."""
TUNING = 2
"""Documents that thresholds are tuned on."""
SHARES = (0.05, 0.1, 0.2, 0.4, 0.7)
"""Of tokens that `snapkv` keeps, to vary retention."""
ALPHA_HIGH = (0.1, 0.3, 1.0, 3.0, 10.0)
ALPHA_LOW = (0.0, 0.1, 0.3, 1.0)
_HIGH, _LOW = DiffXKVConfig().alpha_high, DiffXKVConfig().alpha_low


def variants() -> dict[str, DiffXKVConfig]:
    snapkv, diffkv = VARIANTS["snapkv"], VARIANTS["diffkv"]
    assert snapkv is not None and diffkv is not None
    uniform = {
        f"uniform {tier}": DiffXKVConfig(policy="uniform", tiers=Tiers(tier, "K2V2"))
        for tier in ("K8V8", "K8V4", "K4V8", "K4V4")
    }
    kept = {f"snapkv, {share:g} kept": replace(snapkv, layer_caps=share) for share in SHARES}
    alphas = [(high, _LOW) for high in ALPHA_HIGH] + [(_HIGH, low) for low in ALPHA_LOW]
    thresholds = {
        f"diffkv, α {high:g} / {low:g}": replace(diffkv, alpha_high=high, alpha_low=low)
        for high, low in alphas
    }
    return uniform | kept | thresholds


def importance(states: States) -> torch.Tensor:
    """Of all tokens but the last `QUERIES`, whose attention it is: fp32 [L, H, n - QUERIES]."""
    layers, heads, n, dim = states.keys.shape
    found = torch.empty(layers, heads, n - QUERIES)
    causal = torch.ones(QUERIES, n, dtype=torch.bool).tril(n - QUERIES)
    for layer, (queries, keys) in enumerate(zip(states.queries, states.keys, strict=True)):
        q = queries[:, -QUERIES:].unflatten(0, (heads, -1))
        scores = (q @ keys[:, None].mT * dim**-0.5).masked_fill(~causal, -torch.inf)
        found[layer] = scores.softmax(-1)[..., :-QUERIES].mean(2).amax(1)
    return found


def distributions(items: Sequence[torch.Tensor]) -> str:
    """Share of tokens that holds `TARGET` of a layer's importance, by layer."""
    needed = torch.stack([share_needed(item, TARGET) for item in items])  # [N, L, H]
    lines: list[list[object]] = [["layer", "share of tokens", "KV heads", "documents"]]
    for layer in range(needed.shape[1]):
        here = needed[:, layer]
        ends = [f"{x.min():.1%}–{x.max():.1%}" for x in (here.mean(0), here.mean(1))]
        lines.append([layer, f"{here.mean():.1%}", *ends])
    return table(lines)


def ask(
    reader: Reader, samples: Sequence[Sample], asked: Mapping[Way, Seal]
) -> tuple[list[torch.Tensor], dict[Way, list[Measured]]]:
    """Importance in each document, and what each of the ways makes of it."""
    shape = ModelShape.of(reader.model.config)
    found: dict[Way, list[Measured]] = {way: [] for way in asked}
    items = []
    for sample in samples:
        states = reader.prefill(sample.before)
        items.append(importance(states))
        whole = [LayerPrefix(*pair) for pair in zip(states.keys, states.values, strict=True)]
        full = reader.log_probabilities(sample.after, sample.prefilled, whole)
        dense = sample.compressed * shape.token_bytes
        for way, seal in asked.items():
            sealed = seal(states)
            logs = reader.log_probabilities(sample.after, sample.prefilled, sealed.prefix)
            got = measure(full, logs, sample, sealed.nbytes)
            found[way].append(Measured(got.kl, got.agreement, dense / got.nbytes))
    return items, found


def retained(sealer: Sealer) -> float | None:
    """Mean over layers of what it has sealed; None where nothing is scored."""
    meter = sealer.store.retention
    by_layer = [x for x in meter.by_layer() if x is not None] if meter else []
    return sum(by_layer) / len(by_layer) if by_layer else None


def main() -> None:
    options = parse(__doc__.splitlines()[0], documents=6)
    samples = make_samples(options.model, options.documents + TUNING, [options.length])
    samples, tuning = samples[: options.documents], samples[options.documents :]
    reader = Reader(options.model)
    shape = ModelShape.of(reader.model.config)
    sealers = {Way("", name): Sealer(config, shape) for name, config in variants().items()}
    calibration = Calibration(shape, (reader.prefill(sample.before) for sample in tuning))
    equal = dict(ways(shape, samples[0].compressed, calibration))
    alone = {way: sealer.seal for way, sealer in sealers.items()}
    items, answers = ask(reader, samples, alone | equal)
    lines: list[list[object]] = [["", "KL", "top-1 agreement", "compression", "retention R"]]
    rows = []
    for way, sealer in sealers.items():
        x, kept = mean(answers[way]), retained(sealer)
        shown = "–" if kept is None else f"{kept:.3f}"
        lines.append(
            [way.name, f"{x.kl:.2g}", f"{x.agreement:.1%}", f"{x.compression:.2f}×", shown]
        )
        rows.append(way._asdict() | x._asdict() | {"retention": kept})
    rows += [way._asdict() | mean(answers[way])._asdict() for way in equal]
    text = f"""\
{options.documents} documents of {options.length:,} tokens, half of each sealed as in
[real_models.md](real_models.md). Default thresholds of `diffkv`: {_HIGH:g} / {_LOW:g}.

{table(lines)}

At equal bytes, those of a uniform format each time: thresholds of the paper's ratio, scaled on
{TUNING} other documents until they meet them; the same tokens with the other high tier; as many
tokens of each tier in every head, as the thresholds give all of the document; as many bytes in
every page, by `layer_caps` alone, in whole frames, so that it may take fewer; and `diffxkv` with
that `target`.

{report({way: answers[way] for way in equal})}

Least share of tokens that holds {TARGET:.0%} of a layer's importance (mean attention of the last
{QUERIES} queries, max over the group); in the other columns its range over KV heads and documents.

{distributions(items)}"""
    write_results(
        "real_models_claims", f"{options.model.name}: the papers' claims", {"rows": rows}, text
    )


if __name__ == "__main__":
    main()
