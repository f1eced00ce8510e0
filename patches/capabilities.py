# SPDX-License-Identifier: Apache-2.0
"""What a policy declares about itself, against what the server is told to do.

A combination that gives wrong answers is refused elsewhere; those here serve, but not as a user may
expect, so the log says what to change.
"""

import logging
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view

from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.policy.settings import PolicySettings

log = logging.getLogger(__name__)


def check_capabilities(server_args: Any, policy: type[TierPolicy]) -> list[str]:
    """Log what the policy is not made for; returns the lines."""
    view = resolving_view(server_args)
    found = []
    if not policy.may_share and not view.disable_radix_cache:
        found.append(
            f"policy {policy.name!r} judges a prefix by the question of the first request that "
            "has it, and others read what that left: use --disable-radix-cache or policy "
            f"{PolicySettings().policy!r}"
        )
    if not policy.streams:
        found.append(
            f"policy {policy.name!r} is made for prompts that are prefilled whole: of longer ones "
            f"than --chunked-prefill-size {view.chunked_prefill_size} it judges each chunk, and of "
            "generated text each page, by itself"
        )
    for line in found:
        log.warning("diffxkv: %s", line)
    return found
