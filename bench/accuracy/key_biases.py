# SPDX-License-Identifier: Apache-2.0
"""Large biases on keys, as Qwen2.5 has them, put into a model that has none.

Qwen2.5-7B's have norms of 605 in the first layer, 921 in the last, some 22 between them
(llama.cpp#21385). Here they lie in the slowest pairs of the rotary embedding, where they turn
little from token to token, so that they shift all scores alike and the model works on; or in all
channels. Each model is compared with itself on full KV.

    python -m bench.accuracy.key_biases MODEL [--documents 6]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from bench.accuracy.real_models.__main__ import make_samples
from bench.accuracy.real_models.ours import ModelShape, Sealer
from bench.accuracy.real_models.protocol import Answer, Sample, mean_nll, measure
from bench.accuracy.real_models.reader import LayerPrefix, Reader
from bench.serving.common import write_results
from sglang_diffxkv.config import DiffXKVConfig, Tiers

FIRST, LAST, BETWEEN = 605.0, 921.0, 22.0
SLOW = 4
"""Rotary pairs, of head_dim / 2."""
BIASES = ("none", "slow pairs", "all channels")
LENGTH = 1024


def biased(model: Path, where: str, output: Path) -> None:
    """Save a Llama checkpoint as Qwen2, with biases on its keys."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    known = base.config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    names += ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "head_dim")
    config = Qwen2Config(**{name: known[name] for name in (*names, "eos_token_id")})
    turned = Qwen2ForCausalLM(config)
    lacking, extra = turned.load_state_dict(base.state_dict(), strict=False)
    assert not extra and all(name.endswith("_proj.bias") for name in lacking), (lacking, extra)
    gen = torch.Generator().manual_seed(0)
    layers = turned.model.layers
    for number, layer in enumerate(layers):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            torch.nn.init.zeros_(projection.bias)
        if where == "none":
            continue
        bias = torch.randn(config.num_key_value_heads, 2, attention.head_dim // 2, generator=gen)
        if where == "slow pairs":
            bias[..., :-SLOW] = 0
        norm = FIRST if number == 0 else LAST if number == len(layers) - 1 else BETWEEN
        attention.k_proj.bias.data = (bias * norm / bias.norm()).flatten()
    turned.save_pretrained(output)
    AutoTokenizer.from_pretrained(model, local_files_only=True).save_pretrained(output)


def configs() -> Iterator[tuple[str, DiffXKVConfig, bool]]:
    """Name, configuration, and whether sealed keys are centred."""
    for name, config in (
        ("uniform K8V4", DiffXKVConfig(policy="uniform", tiers=Tiers("K8V4", "K4V2"))),
        ("uniform K4V4", DiffXKVConfig(policy="uniform", tiers=Tiers("K4V4", "K4V2"))),
        ("diffxkv, default", DiffXKVConfig()),
    ):
        yield name, config, True
        yield f"{name}, not centred", config, False


def ask(reader: Reader, samples: list[Sample]) -> tuple[dict[str, list[Answer]], float]:
    """Answers by configuration, and the mean loss of full KV."""
    shape = ModelShape.of(reader.model.config)
    sealers = {name: Sealer(config, shape) for name, config, _ in configs()}
    for name, _, centred in configs():
        if not centred:
            sealers[name].store.key_means.set(torch.zeros(()))
    found: dict[str, list[Answer]] = {name: [] for name in sealers}
    losses = []
    for sample in samples:
        states = reader.prefill(sample.before)
        whole = [LayerPrefix(*pair) for pair in zip(states.keys, states.values, strict=True)]
        full = reader.log_probabilities(sample.after, sample.prefilled, whole)
        losses.append(mean_nll(full, sample))
        for name, sealer in sealers.items():
            sealed = sealer.seal(states)
            logs = reader.log_probabilities(sample.after, sample.prefilled, sealed.prefix)
            found[name].append(measure(full, logs, sample, sealed.nbytes))
    return found, sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a Llama checkpoint")
    parser.add_argument("--documents", type=int, default=6)
    options = parser.parse_args()
    samples = make_samples(options.model, options.documents, [LENGTH])
    rows, table = [], ["| biases | full KV's perplexity | configuration | KL | agreement |"]
    table.append("| --- | --- | --- | --- | --- |")
    for where in BIASES:
        with TemporaryDirectory() as folder:
            biased(options.model, where, Path(folder))
            answers, loss = ask(Reader(Path(folder)), samples)
        for name, found in answers.items():
            kl = sum(x.kl for x in found) / len(found)
            same = sum(x.agreement for x in found) / len(found)
            perplexity = float(torch.tensor(loss).exp())
            rows.append({"biases": where, "name": name, "kl": kl, "agreement": same})
            table.append(f"| {where} | {perplexity:.2f} | {name} | {kl:.3g} | {same:.1%} |")
    about = f"{options.documents} documents of {LENGTH} tokens, half of each sealed."
    text = "\n\n".join([about, "\n".join(table)])
    write_results("key_biases", "Biases on keys", {"rows": rows}, text)


if __name__ == "__main__":
    main()
