# SPDX-License-Identifier: Apache-2.0
"""What the router demo makes of answers; tests/server/test_demo_router.py has the demo itself."""

import math
from pathlib import Path

import pytest

from sglang_diffxkv.cli import main
from sglang_diffxkv.demo.router import process
from sglang_diffxkv.demo.router.measure import WINDOW, Return, by_replica, hit_rate, over_time
from sglang_diffxkv.demo.router.pictures import draw_policies, draw_return
from sglang_diffxkv.demo.router.table import Run, summary, table
from sglang_diffxkv.demo.router.workload import Answered, Shape, open_chats

A, B = NAMES = ("a", "b")


def answers(count: int, replica: str, cached: int, begin: float = 0.0) -> list[Answered]:
    return [Answered(0, replica, 100, cached, begin + second, 0.5) for second in range(count)]


RETURN = Return(
    B, 10.0, 30.0, [*answers(10, B, 90), *answers(40, A, 50), *answers(20, B, 25, begin=31.0)]
)


def _words(text: str) -> int:
    return len(text.split())


def test_hit_rates_weigh_tokens() -> None:
    assert hit_rate([Answered(0, A, 300, 300, 0, 1), Answered(0, A, 100, 0, 1, 1)]) == 0.75
    assert math.isnan(hit_rate([]))
    found = by_replica(RETURN.answers, NAMES)
    assert len(found[A]) == 40 and len(found[B]) == 30


def test_curves_are_of_the_latest_answers() -> None:
    points = over_time([*answers(WINDOW, A, 100, begin=50.0), *answers(WINDOW, A, 0)])
    assert [point.at for point in points] == [*range(WINDOW), *range(50, 50 + WINDOW)]
    assert points[0].hit_rate == points[WINDOW - 1].hit_rate == 0.0
    assert points[WINDOW].hit_rate == pytest.approx(1 / WINDOW)
    assert points[-1].hit_rate == 1.0


def test_a_return_is_told_from_what_was_before() -> None:
    assert [hit_rate(x) for x in (RETURN.before, RETURN.meanwhile, RETURN.after)] == [
        0.9,
        0.5,
        0.25,
    ]
    assert [len(x) for x in (RETURN.before, RETURN.meanwhile, RETURN.after)] == [10, 20, 20]
    told = summary(RETURN)
    assert f"first {WINDOW} requests after, of 20: 25.0%" in told and "after 20 s" in told


def test_table_and_pictures(tmp_path: Path) -> None:
    runs = {
        "round_robin": Run([answers(4, A, 10) + answers(4, B, 30)], evicted_tokens=7),
        "cache_aware": Run([answers(6, A, 80) + answers(2, B, 80)], evicted_tokens=0),
    }
    lines = [" ".join(line.split()) for line in table(runs, NAMES).splitlines()]
    assert "prefix-hit rate 20.0% 80.0%" in lines
    assert "a 10.0% of 4 requests 80.0% of 6 requests" in lines
    assert "turn 1 20.0% 80.0%" in lines
    draw_policies({name: run.answers for name, run in runs.items()}, NAMES, tmp_path / "1.png")
    draw_return(RETURN, NAMES, tmp_path / "2.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_tenants_share_nothing_and_their_chats_the_system_prompt() -> None:
    shape = Shape(tenants=3, chats=2, system_tokens=50)
    chats = [*open_chats(1, shape, _words), *open_chats(2, shape, _words)]
    systems = [chat._messages[0]["content"] for chat in chats]
    assert systems[0::2] == systems[1::2] and len({text[:20] for text in systems}) == 6
    assert all(_words(text) >= 50 for text in systems)


def test_without_the_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    assert main(["demo-router"]) == 1
    err = capsys.readouterr().err
    assert "sglang-diffxkv[router]" in err and err.count("\n") == 1
