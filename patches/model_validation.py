# SPDX-License-Identifier: Apache-2.0
"""Models that the backend does not go with: refused at start, in one line that says why.

`check_model_config` runs in the launching process, on the model's configuration. `check_layers`
runs in the scheduler, on the loaded model: its layers show in the same words for every model what
configuration files name differently or leave to the code.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from sglang.srt.arg_groups.overrides import supports_mamba_cache_extra_buffer
from sglang.srt.configs.hybrid_arch import hybrid_gdn_config, mamba2_config, mambaish_config
from sglang.srt.configs.model_config import AttentionArch, is_minimax_sparse
from sglang.srt.layers.attention.qsa.config import is_qwen_qsa
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from torch import nn

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches.validation import BACKEND
from sglang_diffxkv.policy.registry import make_policy

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig

HEAD_DIMS = (64, 80, 96, 128, 256)
_LEAVE_OUT = f"leave out --attention-backend {BACKEND} or choose another model"


def check_model_config(model: "ModelConfig", config: DiffXKVConfig, ranks: int) -> None:
    """Check a model's configuration, and that the policy suits its dimensions on each rank.

    Raises:
        ValueError: a model that the backend cannot serve.
        ConfigError: a ValueError too: `layer_caps` or a plan do not fit the policy or the model.
    """
    found = _unsupported_kind(model) or _unsupported_shape(model)
    if found is not None:
        name = (model.hf_config.architectures or ["this model"])[0]
        raise ValueError(f"{BACKEND} cannot serve {name}, which has {found}: {_LEAVE_OUT}")
    for rank in range(ranks):
        make_policy(
            config.of_rank(rank, ranks),
            head_dim=model.head_dim,
            num_kv_heads=model.get_num_kv_heads(ranks),
            raw_itemsize=model.dtype.itemsize,
            num_layers=_full_attention_layers(model),
        )


def _full_attention_layers(model: "ModelConfig") -> int:
    """How many layers' KV is ours: SGLang keeps what others need beside it."""
    linear = mambaish_config(model)
    full = (model if linear is None else linear).full_attention_layer_ids
    return model.num_attention_layers if full is None else len(full)


def check_prefix_cache(view: Any, model: "ModelConfig") -> None:
    """Check that SGLang can cache prefixes of a model with linear layers in pages like ours.

    It has to keep their state at the end of a page, which is not done for every architecture.

    Raises:
        ValueError: it cannot.
    """
    if mambaish_config(model) is None or view.disable_radix_cache:
        return
    strategy, name = view.mamba_radix_cache_strategy, model.hf_config.architectures[0]
    if not supports_mamba_cache_extra_buffer(view, model.hf_config):
        raise ValueError(
            f"SGLang caches prefixes of {name} in pages of one token only, those of {BACKEND} have "
            f"{PAGE_TOKENS}: use --disable-radix-cache"
        )
    if strategy == "no_buffer":
        raise ValueError(
            f"--mamba-radix-cache-strategy {strategy} is for pages of one token, {BACKEND} has "
            f"pages of {PAGE_TOKENS}: leave it out"
        )


def check_disk(view: Any, model: "ModelConfig") -> None:
    """Check that pages on disk are all that a server needs to go on with a prompt.

    Raises:
        ValueError: they are not.
    """
    lacking = {
        "--disable-radix-cache": view.disable_radix_cache,
        "sliding windows, whose K/V is SGLang's": model.is_hybrid_swa,
        "linear attention, whose states are SGLang's": mambaish_config(model) is not None,
        f"--speculative-algorithm {view.speculative_algorithm}, whose draft model has K/V of its "
        "own": view.speculative_algorithm not in (None, "NGRAM"),
    }
    found = next((name for name, present in lacking.items() if present), None)
    if found is not None:
        raise ValueError(f"disk_path does not go with {found}: leave disk_path out")


def _unsupported_kind(model: "ModelConfig") -> str | None:
    return next((kind for kind, present in kinds_of(model).items() if present), None)


def kinds_of(model: "ModelConfig") -> dict[str, bool]:
    """Kinds of attention that are not plain and causal, and whether the model has them."""
    text, linear = model.hf_text_config, mambaish_config(model)
    return {
        "multi-head latent attention (MLA)": model.attention_arch == AttentionArch.MLA,
        "a state-space model for attention": model.attention_arch == AttentionArch.SSM,
        "linear attention other than gated delta and Mamba2": _unknown_linear_layers(model),
        "linear attention and sliding windows": linear is not None and model.is_hybrid_swa,
        "no attention layers": linear is not None and not linear.full_attention_layer_ids,
        "sliding windows in all layers": model.full_attention_layer_ids == [],
        "layers that read the K/V of others": bool(getattr(text, "num_kv_shared_layers", None)),
        "chunked local attention": model.attention_chunk_size is not None,
        "dual chunk attention": hasattr(model.hf_config, "dual_chunk_attention_config"),
        "sparse attention": is_minimax_sparse(model.hf_config) or is_qwen_qsa(model.hf_config),
        "images whose tokens see each other (without --enable-multimodal it is served)": (
            _sees_images(model)
        ),
        "cross-attention (encoder-decoder)": model.is_encoder_decoder,
        "no text generation (embedding or reward)": not model.is_generation,
    }


def _sees_images(model: "ModelConfig") -> bool:
    """Gemma's image tokens attend to those behind them, too, for which SGLang sets a mask."""
    mutual = getattr(model.hf_text_config, "use_bidirectional_attention", None) == "vision"
    gemma3 = "Gemma3ForConditionalGeneration" in model.hf_config.architectures
    return model.is_multimodal and (gemma3 or mutual)


def _unknown_linear_layers(model: "ModelConfig") -> bool:
    known = hybrid_gdn_config(model) or mamba2_config(model)
    return mambaish_config(model) is not None and known is None


def _unsupported_shape(model: "ModelConfig") -> str | None:
    query_heads, kv_heads = model.num_attention_heads, model.get_total_num_kv_heads()
    windows = model.swa_head_dim, model.swa_v_head_dim
    for keys, values in {(model.head_dim, model.v_head_dim), windows}:
        if keys not in HEAD_DIMS:
            return f"head_dim {keys} (not one of {', '.join(map(str, HEAD_DIMS))})"
        if values != keys:
            return f"keys of {keys} elements and values of {values}"
    if query_heads % kv_heads:
        return f"{query_heads} query heads, not a multiple of its {kv_heads} KV heads"
    return None


def check_layers(model: nn.Module, windows: Collection[int] = ()) -> None:
    """Check the attention layers of a loaded model.

    Args:
        windows: ids of those whose K/V SGLang keeps in its pool for window layers.

    Raises:
        ValueError: the first layer that is not plain causal self-attention, or unlike the others of
            its kind: with a sliding window, or without.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, RadixAttention)]
    first: dict[bool, RadixAttention] = {}
    for layer in layers:
        has_window = layer.sliding_window_size > 0
        like = first.setdefault(has_window, layer)
        found = _unsupported_layer(layer)
        if found is None and _shape(layer) != _shape(like):
            found = f"heads x dim of {_shape(layer)}, others of {_shape(like)}"
        if found is None and layer.sliding_window_size != like.sliding_window_size:
            found = f"a window of {layer.sliding_window_size}, others of {like.sliding_window_size}"
        if found is None and has_window != (layer.layer_id in windows):
            found = f"a window of {layer.sliding_window_size}, unlike what its layer_types say"
        if found is not None:
            raise ValueError(
                f"{BACKEND} cannot serve this model, whose layer {layer.layer_id} has {found}: "
                f"{_LEAVE_OUT}"
            )


def _unsupported_layer(layer: RadixAttention) -> str | None:
    kinds = {
        f"logits capped by {layer.logit_capping_method}": layer.logit_cap > 0
        and layer.logit_capping_method != "tanh",
        "cross-attention": layer.is_cross_attention,
        "chunked local attention": layer.use_irope,
        "attention that is not causal": layer.attn_type != AttentionType.DECODER,
        "position-dependent temperature": layer.xai_temperature_len > 0,
        f"positional encoding {layer.pos_encoding_mode}": layer.pos_encoding_mode != "NONE",
        "values of another size than keys": layer.v_head_dim != layer.qk_head_dim,
    }
    return next((kind for kind, present in kinds.items() if present), None)


def _shape(layer: RadixAttention) -> tuple[int, int]:
    return layer.tp_k_head_num, layer.qk_head_dim
