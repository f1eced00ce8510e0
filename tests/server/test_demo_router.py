# SPDX-License-Identifier: Apache-2.0
"""The router demo on real servers, with little load: `make demo-router` has more of it."""

from pathlib import Path

import pytest

from sglang_diffxkv.demo.router.measure import hit_rate
from sglang_diffxkv.demo.router.replicas import NAMES
from sglang_diffxkv.demo.router.run import run_router_demo
from sglang_diffxkv.demo.router.workload import Shape
from tests.support.harness import fast_environment

# Tenants that are many for their chats: round robin computes most system prompts twice.
SHAPE = Shape(tenants=4, chats=3, turns=3, system_tokens=384, turn_tokens=96)


@pytest.mark.long
def test_requests_go_where_their_prefix_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fast_environment("cpu").items():
        monkeypatch.setenv(name, value)
    found = run_router_demo("cpu", tmp_path, SHAPE)
    rates = {policy: hit_rate(run.answers) for policy, run in found.runs.items()}
    assert rates["cache_aware"] > rates["round_robin"] + 0.05, rates
    for run in found.runs.values():
        assert [len(turn) for turn in run.turns] == [12, 12, 12]
        assert {answer.replica for answer in run.answers} == set(NAMES)
    back = found.back
    sent_after = [x for x in back.meanwhile if x.at - x.seconds > back.killed_at]
    assert {x.replica for x in sent_after} <= {NAMES[0]}, "the dead answer nothing"
    assert back.before and back.after, "it serves again"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "router_policies.png",
        "router_return.png",
    ]
