# SPDX-License-Identifier: Apache-2.0
"""Streams of a GPU that is none (`fake_device`): beside the usual one, work waits to be waited for.

What is launched on the usual stream runs at once. What is launched on another one runs as late as
it may: when somebody waits for an event behind it. So whoever does not wait, or lets others have
what is still to be read or written, gets wrong bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Event:
    """`torch.cuda.Event` of the usual stream: done once the host has the results of the forward
    pass before it."""

    launched = 0
    """Forward passes so far."""
    seen = 0
    """Of those, whose results the host has."""

    def record(self) -> None:
        self._pass = Event.launched

    def query(self) -> bool:
        return self._pass <= Event.seen

    def synchronize(self) -> None:
        if not self.query():
            note_wait("synchronize")


class Stream:
    """`torch.cuda.Stream`, on which launches are put off.

    Attributes:
        used: storages that were recorded to be used here, by address.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.used: set[int] = set()
        self._later: deque[Callable[[], None]] = deque()
        self._launched = self._done = 0

    def launch(self, work: Callable[[], None]) -> None:
        self._launched += 1
        self._later.append(work)

    def wait_stream(self, other: UsualStream) -> None:
        """Whose work has run."""
        assert isinstance(other, UsualStream)

    def record_event(self) -> Recorded:
        return Recorded(self, self._launched)

    def run(self, launched: int) -> None:
        while self._done < launched:
            self._later.popleft()()
            self._done += 1

    @property
    def pending(self) -> int:
        """Launches that nobody has waited for."""
        return len(self._later)


class Recorded:
    """An event of a `Stream`, behind so many launches."""

    def __init__(self, stream: Stream, launched: int) -> None:
        self._stream, self._launched = stream, launched

    def wait(self) -> None:
        self._stream.run(self._launched)


class UsualStream:
    """Where SGLang's scheduler and its forward passes run, as they wait for each other."""

    device = torch.device("cuda")

    def wait_event(self, event: Recorded) -> None:
        event.wait()

    def record_event(self) -> Event:
        event = Event()
        event.record()
        return event


USUAL = UsualStream()
_current: list[Stream] = []


def current_stream(device: object = None) -> Stream | UsualStream:
    return _current[-1] if _current else USUAL


@contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    _current.append(chosen)
    yield
    _current.pop()


def run_or_put_off(work: Callable[[], None]) -> None:
    """On the current stream."""
    now = current_stream()
    if isinstance(now, Stream):
        now.launch(work)
    else:
        work()


note_wait: Callable[[str], None] = print
"""Set by `fake_device`."""


def reset() -> None:
    Event.launched = Event.seen = 0
