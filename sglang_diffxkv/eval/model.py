# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that is served, as far as an evaluation needs to know it."""

from pathlib import Path
from typing import Any, NamedTuple

from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.eval.dtype import ITEMSIZE, ITEMSIZES


class Model(NamedTuple):
    """Of a checkpoint: what bytes depend on, its tokenizer, and the dtype that it is served in."""

    path: Path
    layers: int
    """Those that attend to the whole context: of others SGLang keeps a window, or a state."""
    window_layers: int
    kv_heads: int
    head_dim: int
    tokenizer: Any
    dtype: str
    """One of `ITEMSIZES`."""

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def layer_token_bytes(self) -> int:
        """Of one token's KV in one layer, in 16 bit."""
        return 2 * self.kv_heads * self.head_dim * ITEMSIZE

    @property
    def token_bytes(self) -> int:
        """Of one token's KV in all layers that attend to it however far it lies back, in 16 bit."""
        return self.layers * self.layer_token_bytes


def load_model(path: Path, dtype: str = "bfloat16") -> Model:
    """Read a Hugging Face checkpoint's configuration and tokenizer; weights are not loaded.

    Args:
        dtype: that it is to be served in.

    Raises:
        ConfigError: there is none, or none that transformers knows.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a checkpoint: {str(error).splitlines()[0]}") from None
    heads = config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return Model(
        path,
        len([kind for kind in kinds if kind in ("full_attention", "attention")]),
        kinds.count("sliding_attention"),
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        tokenizer,
        dtype,
    )
