# SPDX-License-Identifier: Apache-2.0
"""Which speculation the backend goes with: chains of drafts, each the child of the one before it.

Where the user leaves open what shape drafts have, it becomes a chain; what else he asks for is
refused at start, in one line.
"""

from typing import Any

from sglang.srt.arg_groups.model_override_base import get_default_attn_backend
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

from sglang_diffxkv.patches.validation import BACKEND

MOST_NODES = 16
"""Queries of a sequence that a verification has at most: its last token and its drafts."""

WITH_DRAFT_MODEL = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
ALGORITHMS = (*WITH_DRAFT_MODEL, "NGRAM")

_STOCK_BREADTH = 10
"""``speculative_ngram_max_bfs_breadth`` of a user who says nothing about it."""
_STEPS = 3
"""Drafts of a model where the user says nothing, as SGLang has it for top-k 1."""
_REFUSED = {
    "speculative_adaptive": "it plans verifications of one length",
    "enable_multi_layer_eagle": "a draft has one model",
    "speculative_use_block_verification": "drafts are accepted one by one",
}


def algorithm_of(view: Any) -> str | None:
    """The speculative algorithm, in capitals, of arguments that may not be resolved yet."""
    name = view.speculative_algorithm
    return None if name is None else str(name).upper()


def choose_chains(server_args: Any) -> None:
    """Declare what makes drafts chains where the user leaves it open, before SGLang chooses."""
    view = resolving_view(server_args)
    algorithm = algorithm_of(view)
    chosen: dict[str, object] = {}
    if algorithm == "NGRAM" and view.speculative_ngram_max_bfs_breadth == _STOCK_BREADTH:
        chosen["speculative_ngram_max_bfs_breadth"] = 1
    elif algorithm in WITH_DRAFT_MODEL and view.speculative_eagle_topk is None:
        chosen["speculative_eagle_topk"] = 1
    if algorithm in WITH_DRAFT_MODEL and view.speculative_num_steps is None:
        asked = view.speculative_num_draft_tokens
        steps = _STEPS if asked is None else asked - 1
        chosen |= {"speculative_num_steps": steps, "speculative_num_draft_tokens": steps + 1}
    if chosen:
        declare_resolution(server_args, BACKEND, **chosen)


def choose_draft_attention(server_args: Any, model: Any) -> None:
    """Declare for the draft model what SGLang would take for ``model``: its KV is in stock's pool.

    To be called once the device and the shape of drafts are known.
    """
    view = resolving_view(server_args)
    unsaid = view.speculative_draft_attention_backend is None
    if unsaid and algorithm_of(view) in WITH_DRAFT_MODEL:
        backend = get_default_attn_backend(server_args, False, model)
        declare_resolution(server_args, BACKEND, speculative_draft_attention_backend=backend)


def check_speculation(server_args: Any) -> None:
    """Check the flags of speculation as they stand; fit for any moment of resolution.

    Raises:
        ValueError: what the backend does not go with.
    """
    view = resolving_view(server_args)
    algorithm = algorithm_of(view)
    if algorithm is None:
        return
    flag = f"--speculative-algorithm {algorithm}"
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"{flag} does not go with --attention-backend {BACKEND}, which verifies chains of "
            f"drafts: use {', '.join(ALGORITHMS[:-1])} or {ALGORITHMS[-1]}"
        )
    for field, why in _REFUSED.items():
        if getattr(view, field):
            raise ValueError(
                f"{_name(field)} does not go with --attention-backend {BACKEND}: {why}; "
                "leave it out"
            )
    shape = (
        "speculative_eagle_topk" if algorithm != "NGRAM" else "speculative_ngram_max_bfs_breadth"
    )
    width = getattr(view, shape)
    if width is not None and width > 1:
        raise ValueError(
            f"{_name(shape)} {width} does not go with --attention-backend {BACKEND}, which "
            "verifies chains of drafts, not trees; use 1"
        )
    nodes = view.speculative_num_draft_tokens
    if nodes is not None and nodes > MOST_NODES:
        raise ValueError(
            f"--speculative-num-draft-tokens {nodes} does not go with --attention-backend "
            f"{BACKEND}, which verifies {MOST_NODES} tokens of a request at once: use at most that"
        )
    if view.speculative_draft_attention_backend == BACKEND:
        raise ValueError(
            f"--speculative-draft-attention-backend {BACKEND}: a draft model's KV is in a pool of "
            "SGLang's own; leave it out"
        )
    if view.device == "cpu" and view.speculative_use_rejection_sampling:
        raise ValueError(
            "--speculative-use-rejection-sampling needs a GPU, whose kernels sample so; leave it "
            "out"
        )


def _name(field: str) -> str:
    return "--" + field.replace("_", "-")
