# SPDX-License-Identifier: Apache-2.0
"""The sequences of a decode step, or of a verification: one with N new tokens of each.

A verification writes a chain of drafts behind a sequence's committed tokens (`pool.committed`). The
first is the token that was sampled last, so it is always accepted: all that is noted of a sequence
is as if it ended there, and its query alone scores open tokens, as that of a decode step does. What
a rejected draft looked at decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class DecodeBatch(NamedTuple):
    """Padding left out.

    Attributes:
        req_pool_indices: int64 [B].
        seq_lens: int64 [B], committed tokens when the step ends: its own, or its first draft,
            included.
        seq_lens_cpu: int64 [B], the same on the host.
    """

    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor


def decode_batch(forward_batch: Any) -> DecodeBatch:
    """Of SGLang's ``ForwardBatch``, or the view of one that it replays graphs with."""
    fb = forward_batch
    real = fb.batch_size - getattr(fb, "num_padding", 0)
    # SGLang counts a decode step's token, and none of a verification's.
    first = int(fb.forward_mode.is_target_verify())
    return DecodeBatch(
        fb.req_pool_indices[:real].long(),
        fb.seq_lens[:real].long() + first,
        fb.seq_lens_cpu[:real].long() + first,
    )


class StepTokens(NamedTuple):
    """What kernels are told of a batch, padding included.

    Attributes:
        req_pool_indices: int64 (or int32) [B].
        seq_lens: int64 (or int32) [B], tokens with all new ones.
        queries: new tokens of each sequence.
    """

    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    queries: int


def step_tokens(forward_batch: ForwardBatch) -> StepTokens:
    """Of SGLang's batch, in operations that a CUDA graph may hold."""
    fb = forward_batch
    if not fb.forward_mode.is_target_verify():
        return StepTokens(fb.req_pool_indices, fb.seq_lens, 1)
    drafts = fb.spec_info.draft_token_num
    return StepTokens(fb.req_pool_indices, fb.seq_lens + drafts, drafts)
