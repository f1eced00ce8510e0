# SPDX-License-Identifier: Apache-2.0
"""What a draft model's KV takes of the budget.

It lies in a pool of SGLang's own, uncompressed, where the target's token slots index it: a slot of
every virtual page that is in use holds the draft's KV of its token, be the page open or sealed. So
the pool has as many tokens as there are virtual ones, and these are as many as the budget holds.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

DRAFT_SLACK = 1.0
"""Virtual pages per page that is expected to fit: beyond them the draft's pool would take memory
from pages that are in use."""


def draft_token_bytes(configurator: Any) -> int:
    """Bytes of the draft model's KV a token, on a rank; 0 where nobody drafts with a model."""
    from sglang.srt.runtime_context import get_parallel

    drafts = configurator.spec_aux_config
    if not drafts.draft_kv_num_layers:
        return 0
    model = drafts.draft_model_config
    heads = model.get_num_kv_heads(get_parallel().attn_tp_size)
    width = model.head_dim + model.v_head_dim
    return int(drafts.draft_kv_num_layers * heads * width * model.dtype.itemsize)


def log_draft_pool(token_bytes: int, tokens: int) -> None:
    """Say what part of the budget is the draft's."""
    logger.info(
        "diffxkv: of its memory the draft model's KV takes %.1f MiB, uncompressed, for %d tokens",
        token_bytes * tokens / 2**20,
        tokens,
    )
