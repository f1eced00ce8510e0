# SPDX-License-Identifier: Apache-2.0
"""A replica is killed while chats speak, is started again, and chats return to it.

At the first request that would have gone to a dead worker the router forgets all that it knew of
it. From then on a prefix is that of the worker which computed it meanwhile, and a prefix that
nobody asked for is new to the router: it goes where fewer requests run.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence

from sglang_diffxkv.demo.router.measure import Return
from sglang_diffxkv.demo.router.process import RouterProcess
from sglang_diffxkv.demo.router.replicas import Servers
from sglang_diffxkv.demo.router.workload import Answered, Chat, shuffled, speak
from sglang_diffxkv.demo.workload import connect
from sglang_diffxkv.launch import ServerError

_TURNS_AFTER = 2
_NOTICE_TIMEOUT_S = 60.0


def kill_and_return(
    router: RouterProcess,
    servers: Servers,
    chats: Sequence[Chat],
    last: Sequence[Answered],
    at_once: int,
) -> Return:
    """Kill the replica that serves most tenants, start it again, and have all chats speak.

    All tenants but some of the dead replica's speak while it is away.

    Args:
        last: answers of the turn before, by which it is known who is served where.

    Raises:
        ServerError: it did not start again, or the router did not notice.
    """
    homes = _homes(last)
    name = Counter(homes.values()).most_common(1)[0][0]
    moving, *silent = [tenant for tenant, home in homes.items() if home == name]
    loud = shuffled([chat for chat in chats if chat.tenant not in silent], seed=0)
    client, victim = connect(router.url), servers[name]
    answers = list(last)
    killed_at = 0.0
    for answer in speak(client, loud, at_once):
        answers.append(answer)
        if not killed_at:
            victim.kill()
            killed_at = time.monotonic()
            print(f"killed {name} while {len(loud)} chats speak", flush=True)
    print(f"starting {name} again; tenant {moving + 1} of it has moved", flush=True)
    victim.start()
    _wait_until_noticed(router, len(servers))
    returned_at = time.monotonic()
    # First those who keep the other replicas busy.
    quiet = shuffled([chat for chat in chats if chat.tenant in silent], seed=1)
    for _ in range(_TURNS_AFTER):
        answers += speak(client, [*loud[:at_once], *quiet, *loud[at_once:]], at_once)
    return Return(name, killed_at, returned_at, answers)


def _homes(answers: Iterable[Answered]) -> dict[int, str]:
    """The replica that answered most of a tenant's requests, by tenant."""
    counts: dict[int, Counter[str]] = {}
    for answer in answers:
        counts.setdefault(answer.tenant, Counter())[answer.replica] += 1
    return {tenant: counts[tenant].most_common(1)[0][0] for tenant in sorted(counts)}


def _wait_until_noticed(router: RouterProcess, workers: int) -> None:
    deadline = time.monotonic() + _NOTICE_TIMEOUT_S
    while router.healthy_workers() < workers:
        if time.monotonic() > deadline:
            raise ServerError("the router did not notice that the replica is back")
        time.sleep(0.2)
