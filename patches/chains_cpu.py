# SPDX-License-Identifier: Apache-2.0
"""Hook: on our CPU platform SGLang's speculative workers run on torch, not on kernels for GPUs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from sglang.srt.mem_cache.allocation import get_last_loc_torch
from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.hook import HookError, hook
from sglang_diffxkv.platform import chains, draft_attention, sampling

_OPS = "sglang.kernels.ops.speculative"
_FULL_MASK = 0
"""Of SGLang's ``TreeMaskMode``: the mask's rows begin with a sequence's earlier tokens."""


def _link_ngram(mask: torch.Tensor, seq_lens: torch.Tensor, *outputs: Any) -> None:
    *links, _, _ = outputs
    chains.link_chains(seq_lens, chains.Links(*links))


def _link(parents: Any, scores: Any, seq_lens: torch.Tensor, mask: Any, *outputs: Any) -> None:
    *links, _topk, _steps, nodes, mode = outputs
    chains.link_chains(seq_lens, chains.Links(*links))
    lengths = seq_lens.tolist()
    chains.mask_chains(lengths if mode == _FULL_MASK else [0] * len(lengths), nodes, mask)


def _accepted(told: dict[str, torch.Tensor]) -> chains.Accepted:
    return chains.Accepted(told["predicts"], told["accept_index"], told["accept_token_num"])


def _verify(**told: Any) -> chains.Accepted:
    accepted = _accepted(told)
    chains.verify_greedy(told["candidates"], told["target_predict"], accepted)
    return accepted


def _sample(**told: Any) -> None:
    coins = sampling.Coins(told["uniform_samples"], told["uniform_samples_for_final_sampling"])
    thresholds = told["threshold_single"], told["threshold_acc"]
    accepted = _accepted(told)
    sampling.sample_chains(told["candidates"], told["target_probs"], coins, accepted, thresholds)


OPERATIONS: dict[str, tuple[Callable[..., Any], str]] = {
    f"{_OPS}.cache_locs.assign_draft_cache_locs_contiguous_func": (
        chains.draft_slots,
        "req_pool_indices req_to_token seq_lens out_cache_loc topk num_cols",
    ),
    f"{_OPS}.eagle.fill_bonus_tokens_func": (
        chains.last_tokens,
        "accept_tokens accept_lens bonus_tokens accept_stride batch_size",
    ),
    f"{_OPS}.spec_tree.build_tree_kernel_efficient_func": (
        _link,
        "parent_list top_scores_index seq_lens tree_mask positions retrieve_index "
        "retrieve_next_token retrieve_next_sibling topk spec_steps num_verify_tokens "
        "tree_mask_mode",
    ),
    f"{_OPS}.spec_tree.verify_tree_greedy_func": (
        _verify,
        "predicts accept_index accept_token_num candidates target_predict",
    ),
    "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func": (
        chains.write_slots,
        "req_pool_indices req_to_token start_offset end_offset out_cache_loc batch_size",
    ),
    "sglang.srt.mem_cache.allocation.get_last_loc": (
        get_last_loc_torch,
        "req_to_token req_pool_indices_tensor prefix_lens_tensor",
    ),
}
"""Functions of SGLang that start kernels, what takes their place, and parameters it relies on."""
MISSING: dict[str, Callable[..., Any]] = {
    "top_k_renorm_prob": sampling.top_k_renorm,
    "top_p_renorm_prob": sampling.top_p_renorm,
    "tree_speculative_sampling_target_only": _sample,
}
"""What SGLang's ``eagle_utils`` has for GPUs alone."""
_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory"


def install() -> None:
    """Register the hooks and fill in what is missing; on other platforms nothing."""
    if not current_platform.is_out_of_tree():
        return
    with _importable("sgl_kernel.speculative", reconstruct_indices_from_tree_mask=_link_ngram):
        importlib.import_module(f"{_OPS}.reconstruct_tree")
    for target, (function, parameters) in OPERATIONS.items():
        hook(target, function, HookType.REPLACE, tuple(parameters.split()))
    utils = importlib.import_module("sglang.srt.speculative.eagle_utils")
    for name, function in MISSING.items():
        if getattr(utils, name, function) is not None:
            raise HookError(f"diffxkv: SGLang's eagle_utils has no {name}, or one for CPUs")
        setattr(utils, name, function)
    hook(f"{_FACTORY}.create_decode_backend", _draft_steps, HookType.AROUND, ())
    hook(f"{_FACTORY}.create_draft_extend_backend", _draft_extend, HookType.AROUND, ())


@contextmanager
def _importable(name: str, **functions: Callable[..., Any]) -> Iterator[None]:
    """A module of which others import ``functions``, for as long as they are imported."""
    module = ModuleType(name)
    vars(module).update(functions)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


def _draft_steps(original: Callable[..., Any], self: Any) -> Any:
    if self.draft_attn_backend != "torch_native" or self.speculative_num_steps < 2:
        return original(self)
    return draft_attention.DraftSteps(self.draft_model_runner, self.speculative_num_steps)


def _draft_extend(original: Callable[..., Any], self: Any) -> Any:
    """None: the draft model's own backend does it."""
    return None if self.draft_attn_backend == "torch_native" else original(self)
