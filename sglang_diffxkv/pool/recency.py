# SPDX-License-Identifier: Apache-2.0
"""When pages were last used: which are cold, and which lie in a running sequence's window."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.clock import ClockHand
from sglang_diffxkv.pool.directory import PageDirectory
from sglang_diffxkv.pool.raw_pages import RawPages

RAW_WINDOW = 4096
"""Raw pages that are searched at once for the coldest."""
SEALED_WINDOW = 4096
"""Virtual pages that are searched at once for the coldest sealed ones."""


class Recency:
    """Counts steps, and keeps what the directory knows of use.

    Attributes:
        forward_passes: so far.
        step: these, and the times that the scheduler looked for prompts to admit.
        decode_step: forward passes that had the next token of every running request; from 1 on,
            as 0 stands for never.
        decoded_at: the latest such step.
        raw_hand, sealed_hand: where the searches for cold raw pages and cold sealed ones go on.
    """

    def __init__(self, directory: PageDirectory, raw: RawPages) -> None:
        self._directory, self._raw = directory, raw
        self.forward_passes, self.step, self.decode_step, self.decoded_at = 0, 0, 1, 0
        self.raw_hand = ClockHand(raw.page.numel() - 1, RAW_WINDOW)
        self.sealed_hand = ClockHand(directory.num_pages, SEALED_WINDOW)

    @property
    def next_step(self) -> int:
        return self.step + 1

    def schedule(self) -> None:
        """The scheduler looks for prompts to admit.

        What was expected for a step that never came, as its request was aborted, is held by nobody
        now: if nothing else can run, no forward pass would ever make it cold.
        """
        self.step += 1

    def begin(self, decodes: bool) -> None:
        """A forward pass begins; ``decodes``: with the next token of every running request."""
        self.forward_passes += 1
        self.step += 1
        if decodes:
            self.decode_step += 1
            self.decoded_at = self.step

    def touch(
        self, pages: torch.Tensor, position: torch.Tensor, context: torch.Tensor, window: int
    ) -> None:
        """Note that open ``pages`` are about to be written or attended to in this step.

        Args:
            pages: int64 [N] open pages, all that a sequence of the batch has; may repeat.
            position: int64 [N], their index in the sequence.
            context: int64 [N], committed tokens of the sequence when the step ends; pages behind
                them have drafts only.
            window: recent tokens that a running sequence wants to keep raw.
        """
        d = self._directory
        end = (position + 1) * PAGE_TOKENS
        d.position[pages] = position.to(torch.int32)
        d.context[pages] = context.to(torch.int32)
        d.filled[pages] = filled(position, context)
        recent = pages[end > context - window]
        d.window_step.index_fill_(0, recent, self.decode_step)
        d.last_used.index_fill_(0, pages, self.step)

    def read(self, pages: torch.Tensor) -> None:
        """Note that sealed ``pages`` (int [N], may repeat) are about to be attended to."""
        self._directory.last_used.index_fill_(0, pages.long(), self.step)

    def expect(self, pages: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
        """Note that ``pages`` (int64 [N], or ``which`` of them: bool [N]) will be attended to in
        the next step.

        Returns:
            The steps that used them last before, for `withdraw`: int [N].
        """
        before = self._directory.last_used[pages]
        if which is None:
            self._directory.last_used.index_fill_(0, pages, self.next_step)
        else:
            self._directory.last_used[pages] = before.masked_fill(which, self.next_step)
        return before

    def withdraw(self, pages: torch.Tensor, before: torch.Tensor) -> None:
        """``pages`` that were expected will not be attended to in the next step after all."""
        self._directory.last_used[pages] = before

    def in_window(self, pages: torch.Tensor) -> torch.Tensor:
        """Which ``pages`` (int64 [N]) lie in the recent window of a sequence that may still run.

        A running request decodes in every decode step, so a page that was not in a window at the
        latest one is in none. Requests that finished since then are not told apart.
        """
        return self._directory.window_step[pages] == self.decode_step

    def sealable(self, slots: slice, include_window: bool) -> torch.Tensor:
        """Full pages of some raw slots that may be sealed, coldest first; int64 [N]."""
        d = self._directory
        pages = self._raw.page[1:][slots].long()  # slots, which all ranks give out alike
        mask = (pages > 0) & (d.filled[pages] == PAGE_TOKENS) & ~d.never_compressed(pages)
        if not include_window:
            mask &= ~self.in_window(pages)
        pages = pages[mask]
        return pages[torch.argsort(d.last_used[pages], stable=True)]

    def unheld_full(self, since: int) -> torch.Tensor:
        """Full pages that may be sealed, and that no step since that one has used; int64 [N]."""
        pages = self.sealable(slice(None), include_window=True)
        return pages[self._directory.last_used[pages] < since]

    def any_sealed_before(self, since: int) -> bool:
        """Whether no step since that one has used some sealed page; looks at all."""
        d = self._directory
        return bool((d.sealed & (d.last_used < since)).any())

    def never_compressed_unused(self, since: int) -> int:
        """How many pages that are never compressed no step since that one has used.

        Looks at the raw pages, not more.
        """
        d = self._directory
        pages = self._raw.page[1:].long().clamp(min=0)
        return int(((pages > 0) & d.never_compressed(pages) & (d.last_used[pages] < since)).sum())


def filled(position: torch.Tensor, context: torch.Tensor | int) -> torch.Tensor:
    """Committed tokens in pages at ``position`` (int64 [N]) of sequences that have ``context``
    (int64 [N]) of them: int32 [N]."""
    return (context - position * PAGE_TOKENS).clamp(0, PAGE_TOKENS).to(torch.int32)
