# SPDX-License-Identifier: Apache-2.0
"""Trains the bundled demo model from scratch on the harness's tasks; resumes where it stopped.

Chats start short and get longer as accuracy rises, so that what is learnt is to find content, not
a distance. Every chat is new, hence the accuracy it prints is that on unseen samples (with the
training filler).

    python -m bench.accuracy.train --output build/demo-model
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from bench.accuracy.corpus import DRILL, Batch, Corpus
from bench.accuracy.init import look_back
from bench.accuracy.tokenizer import CHAT_TEMPLATE, make_tokenizer
from tests.support.demo_model import save_tokenizer

CONTEXT = 4096
LENGTHS = (64, 128, 256, 512, 1024, 2048)
PROMOTE_AT = 0.9
"""Accuracy of the retrieval tasks at the longest length in use from which a longer one joins."""
RETRIEVAL = ("niah_single", "niah_multikey", "kv_lookup")
DRILLS = (12.0, 2.0)
"""Weight of drills in the data while chats are as short as can be, and later."""
MIX = {
    "niah_single": 1.0,
    "niah_multikey": 2.0,
    "niah_multiquery": 1.5,
    "kv_lookup": 2.0,
    "vt": 1.0,
    "cwe": 1.0,
    "fwe": 0.3,
    "copy": 1.0,
    "recall": 2.0,
    "records": 8.0,
}
WARMUP_STEPS = 50
DECAY_SHARE = 0.25
"""Of the token budget over which the learning rate falls to zero, at the end."""
MEMORY = 0.98
"""Of the running averages, per sample."""


class Options(NamedTuple):
    output: Path
    tokens: float
    batch: int
    seed: int
    device: str
    hidden: int
    layers: int
    muon: float
    adam: float
    save_every: float


class Trainer:
    """Model, optimisers, data and averages: everything that a checkpoint holds."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.tokenizer = make_tokenizer()
        self.model = LlamaForCausalLM(llama_config(self.tokenizer, options)).to(options.device)
        look_back(self.model)
        self.decoder = torch.compile(self.model.model, dynamic=False)
        self.optimisers = make_optimisers(self.model, options)
        self.rates = [group["lr"] for o in self.optimisers for group in o.param_groups]
        self.seen = 0
        self.step = 0
        self.stage = 0
        self.seconds = 0.0
        self.accuracy: dict[str, float] = {}
        self.loss = 0.0
        self.starts: list[dict[str, Any]] = []

    def run(self) -> None:
        # One stream of data per start: a resumed run goes on with chats it has not seen.
        corpus = Corpus(self.tokenizer, hash((self.options.seed, self.step)))
        options = {key: str(value) for key, value in self.options._asdict().items()}
        self.starts.append({"seen_tokens": self.seen, "mix": MIX, "options": options})
        begin, saved = time.monotonic() - self.seconds, time.monotonic()
        bar = tqdm(total=int(self.options.tokens), initial=self.seen, unit="token", unit_scale=True)
        while self.seen < self.options.tokens:
            mix = MIX | {DRILL: DRILLS[self.stage > 0]}
            batch = corpus.batch(self._length(), self.options.batch, mix)
            self._train(batch)
            self.seconds = time.monotonic() - begin
            bar.update(batch.ids.numel())
            bar.set_postfix_str(self.progress(), refresh=False)
            if time.monotonic() - saved > self.options.save_every:
                self.save()
                saved = time.monotonic()
            self._promote()
        bar.close()
        self.save()

    def _length(self) -> int:
        """The longest length in use twice as often as each shorter one."""
        weights = [1.0] * self.stage + [2.0]
        choice = torch.multinomial(torch.tensor(weights), 1)
        return LENGTHS[int(choice)]

    def _train(self, batch: Batch) -> None:
        device = self.options.device
        ids, weights = batch.ids.to(device), batch.weights.to(device)
        hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        used = weights[:, 1:] > 0
        logits = self.model.lm_head(hidden[used])
        target, weight = ids[:, 1:][used], weights[:, 1:][used]
        loss = (cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._set_rates()
        for optimiser in self.optimisers:
            optimiser.step()
        self.seen += batch.ids.numel()
        self.step += 1
        self.loss = loss.item() if self.step == 1 else 0.95 * self.loss + 0.05 * loss.item()
        right = torch.zeros_like(used)
        right[used] = logits.detach().argmax(-1) == target
        self._score(batch, right.cpu())

    def _score(self, batch: Batch, right: torch.Tensor) -> None:
        """Running accuracy by task and length: an answer counts if all of its tokens are right."""
        length = next(n for n in LENGTHS if n >= batch.ids.shape[1])
        for row, chat in zip(right, batch.chats, strict=True):
            exact = sum(bool(row[a - 1 : b - 1].all()) for a, b in chat.answers)
            key, share = f"{chat.task}@{length}", exact / len(chat.answers)
            self.accuracy[key] = MEMORY * self.accuracy.get(key, share) + (1 - MEMORY) * share

    def _promote(self) -> None:
        longest = LENGTHS[self.stage]
        found = [self.accuracy.get(f"{task}@{longest}", 0.0) for task in RETRIEVAL]
        if self.stage + 1 < len(LENGTHS) and min(found) >= PROMOTE_AT:
            self.stage += 1

    def _set_rates(self) -> None:
        left = 1 - self.seen / self.options.tokens
        factor = min(1.0, (self.step + 1) / WARMUP_STEPS, left / DECAY_SHARE)
        groups = [group for o in self.optimisers for group in o.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * max(factor, 0.0)

    def progress(self) -> str:
        """Loss, and accuracy by task at the longest length in use."""
        longest = LENGTHS[self.stage]
        tasks = " ".join(
            f"{task} {self.accuracy[f'{task}@{longest}']:.0%}"
            for task in (DRILL, *MIX)
            if f"{task}@{longest}" in self.accuracy
        )
        return f"loss {self.loss:.3f} @{longest}: {tasks}"

    def save(self) -> None:
        folder = self.options.output
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": {key: getattr(self, key) for key in _PROGRESS},
        }
        torch.save(state, folder / "checkpoint.part")
        (folder / "checkpoint.part").rename(folder / "checkpoint.pt")

    def load(self) -> None:
        state = torch.load(self.options.output / "checkpoint.pt", map_location="cpu")
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        for key, value in state["progress"].items():
            setattr(self, key, value)


_PROGRESS = ("seen", "step", "stage", "seconds", "accuracy", "loss", "starts")


def llama_config(tokenizer: Tokenizer, options: Options) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        # Slow rotations: heads that look for content must not mind how far away it is.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|end|>"),
        pad_token_id=tokenizer.token_to_id("<|pad|>"),
    )


def make_optimisers(model: LlamaForCausalLM, options: Options) -> list[Any]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices, lr=options.muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=options.adam, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def export(trainer: Trainer, folder: Path) -> None:
    """Write the model as bf16 safetensors, with its tokenizer and how it was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer.model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(trainer.tokenizer, folder, CONTEXT, CHAT_TEMPLATE)
    facts = {
        "seen_tokens": trainer.seen,
        "seconds": round(trainer.seconds),
        "starts": trainer.starts,
        "accuracy_in_training": {k: round(v, 3) for k, v in sorted(trainer.accuracy.items())},
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--tokens", type=float, default=8.3e6)
    parser.add_argument("--batch", type=int, default=8192, help="tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--muon", type=float, default=5e-3, help="learning rate of the matrices")
    parser.add_argument("--adam", type=float, default=3e-3, help="of embedding and norms")
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds")
    trainer = Trainer(Options(**vars(parser.parse_args())))
    if (trainer.options.output / "checkpoint.pt").exists():
        trainer.load()
    trainer.run()
    export(trainer, trainer.options.output)


if __name__ == "__main__":
    main()
