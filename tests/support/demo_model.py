# SPDX-License-Identifier: Apache-2.0
"""Writes a small random Llama as a Hugging Face checkpoint, with a tokenizer of bytes.

Its texts are meaningless; its shapes, its memory and the paths it takes through SGLang are real.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS = "<|end|>"
SPECIAL_TOKENS = ("<|pad|>", EOS, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)

# Standard deviation of attention scores. At 3, a tenth of the tokens get 90 % of the attention (in
# trained models, too, few matter), and greedy output does not fall into a loop at once.
_SCORE_STD = 3.0
_LOGIT_STD = 4.0


class DemoModel(NamedTuple):
    """A Llama; the same one always has the same files."""

    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 256
    vocab: int = 320
    """Token ids 0-255 are bytes, then SPECIAL_TOKENS, then reserved ones up to this."""
    dtype: str = "float32"
    """Of the stored weights."""
    seed: int = 0
    max_position: int = 8192

    def check(self) -> None:
        """
        Raises:
            ValueError: there can be no such model.
        """
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")
        if self.vocab < MIN_VOCAB:
            raise ValueError(f"vocab must be at least {MIN_VOCAB}, not {self.vocab}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )

    def config(self) -> dict[str, object]:
        """What `config.json` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": self.dtype,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "eos_token_id": _token_id(EOS),
            "pad_token_id": _token_id("<|pad|>"),
        }


def write_demo_model(path: str | Path, **dimensions: Any) -> Path:
    """Write config, weights, tokenizer and chat template of a `DemoModel` to folder `path`.

    Args:
        dimensions: fields of the model that are not to be the defaults.

    Returns:
        The folder.
    """
    model = DemoModel(**dimensions)
    model.check()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", model.config())
    _write_json(folder / "generation_config.json", {"eos_token_id": _token_id(EOS)})
    dtype = getattr(torch, model.dtype)
    stored = {name: w.to(dtype).contiguous() for name, w in _weights(model).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, model.vocab, model.max_position)
    return folder


def write_eagle_draft(path: str | Path, **dimensions: Any) -> Path:
    """Write an EAGLE draft of one layer for a `DemoModel` of these dimensions to folder `path`.

    It reads the target's hidden states, but has learnt nothing: few of its drafts are accepted.
    """
    model = DemoModel(**{"seed": 1, **dimensions, "layers": 1})
    folder = write_demo_model(path, **model._asdict())
    config = model.config() | {"architectures": ["LlamaForCausalLMEagle"]}
    _write_json(folder / "config.json", config)
    weights = {
        name.removeprefix("model."): weight.to(getattr(torch, model.dtype))
        for name, weight in _weights(model).items()
        if "layers.0." in name and "input_layernorm" not in name
    }
    generator = torch.Generator().manual_seed(model.seed)
    joined = torch.randn(model.hidden, 2 * model.hidden, generator=generator)
    weights["fc.weight"] = (joined / joined.shape[1] ** 0.5).to(getattr(torch, model.dtype))
    weights["fc.bias"] = torch.zeros(model.hidden, dtype=getattr(torch, model.dtype))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _token_id(special: str) -> int:
    return 256 + SPECIAL_TOKENS.index(special)


def _weights(model: DemoModel) -> dict[str, torch.Tensor]:
    """Llama's tensors by name, float32 `[out, in]`, scaled to keep activations near unit size."""
    generator = torch.Generator().manual_seed(model.seed)
    hidden, vocab, head_dim = model.hidden, model.vocab, model.head_dim

    def normal(out: int, fan_in: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(out, fan_in, generator=generator) * (gain / fan_in**0.5)

    weights = {"model.embed_tokens.weight": normal(vocab, hidden, gain=hidden**0.5)}
    for i in range(model.layers):
        layer = {
            "self_attn.q_proj": normal(model.heads * head_dim, hidden, gain=_SCORE_STD),
            "self_attn.k_proj": normal(model.kv_heads * head_dim, hidden),
            "self_attn.v_proj": normal(model.kv_heads * head_dim, hidden),
            "self_attn.o_proj": normal(hidden, model.heads * head_dim),
            "mlp.gate_proj": normal(2 * hidden, hidden),
            "mlp.up_proj": normal(2 * hidden, hidden),
            "mlp.down_proj": normal(hidden, 2 * hidden),
            "input_layernorm": torch.ones(hidden),
            "post_attention_layernorm": torch.ones(hidden),
        }
        weights |= {f"model.layers.{i}.{name}.weight": w for name, w in layer.items()}
    weights["model.norm.weight"] = torch.ones(hidden)
    head = normal(vocab, hidden, gain=_LOGIT_STD)
    # Only printable ASCII and the end token get large logits, so that output is text: bytes above
    # would be broken UTF-8, which SGLang holds back when it streams.
    printable = torch.zeros(vocab, 1)
    printable[32:127] = 1
    printable[_token_id(EOS)] = 1
    weights["lm_head.weight"] = head * printable
    return weights


def write_tokenizer(folder: Path, vocab: int, max_position: int) -> None:
    """A byte-level BPE tokenizer without merges: one token per byte."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocab(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{i}|>" for i in range(vocab - MIN_VOCAB)]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (*SPECIAL_TOKENS, *reserved)
        ]
    )
    save_tokenizer(tokenizer, folder, max_position, CHAT_TEMPLATE)


def save_tokenizer(
    tokenizer: Tokenizer, folder: Path, max_position: int, chat_template: str
) -> None:
    """Write it to `folder` as Hugging Face's loaders read it; `EOS` ends a message."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": "<|pad|>",
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_position,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def byte_vocab() -> dict[str, int]:
    """The character by which byte-level tokenizers write each byte (GPT-2's), to its value."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
