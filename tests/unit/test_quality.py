# SPDX-License-Identifier: Apache-2.0
"""What requests may ask for, and how the scheduler treats lossless ones; no server."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches import lossless
from sglang_diffxkv.patches import quality as seam
from sglang_diffxkv.policy.diffkv import DiffKVPolicy
from sglang_diffxkv.policy.lossless import LosslessPolicy
from sglang_diffxkv.policy.quality import Quality, QualityError, requested_quality
from sglang_diffxkv.pool.request_rows import RequestRows
from tests.unit.test_allocator import make_allocator


class GradingPolicy(DiffKVPolicy):
    grades_quality: ClassVar[bool] = True


def ask(level: object) -> dict[str, Any]:
    return {"diffxkv": {"quality": level}}


@pytest.mark.parametrize("level", Quality)
def test_levels_by_name(level: Quality) -> None:
    assert requested_quality(ask(level.name.lower()), GradingPolicy) is level


@pytest.mark.parametrize("params", [None, {}, {"diffxkv": {}}, {"thinking_budget": 5}, "text", [1]])
def test_balanced_without_a_wish(params: object) -> None:
    assert requested_quality(params, DiffKVPolicy) is Quality.BALANCED


def test_other_keys_are_left_alone() -> None:
    params = {"bias": [1, 2], "quality": "no level"} | ask("small")
    assert requested_quality(params, GradingPolicy) is Quality.SMALL


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("high", "custom_params.diffxkv = 'high' is not allowed; expected an object"),
        (None, "custom_params.diffxkv = None is not allowed"),
        (["quality"], "expected an object such as"),
        ({"level": "high"}, "unknown key 'level'; known keys: quality"),
        ({"Quality": "high"}, "unknown key 'Quality'; did you mean 'quality'?"),
        ({"quality": "high", 7: 1}, "unknown key 7"),
        ({"quality": "hihg"}, "did you mean 'high'? one of: lossless, high, balanced, small"),
        ({"quality": "HIGH"}, "quality = 'HIGH' is not allowed; did you mean 'high'?"),
        ({"quality": "?" * 500}, "is not allowed; one of: lossless, high, balanced, small"),
        ({"quality": None}, "custom_params.diffxkv.quality = None is not allowed"),
        ({"quality": 1}, "quality = 1 is not allowed"),
        ({"quality": True}, "quality = True is not allowed"),
        ({"quality": ["high"]}, "is not allowed; "),
    ],
)
def test_mistakes_are_refused_in_one_line(given: object, text: str) -> None:
    with pytest.raises(QualityError) as refusal:
        requested_quality({"diffxkv": given}, GradingPolicy)
    assert text in str(refusal.value)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200


@pytest.mark.parametrize("level", ["high", "small"])
def test_levels_need_a_policy_that_grades_them(level: str) -> None:
    with pytest.raises(QualityError, match=r"needs policy 'diffxkv'.* serves: lossless, balanced"):
        requested_quality(ask(level), DiffKVPolicy)
    assert requested_quality(ask("lossless"), DiffKVPolicy) is Quality.LOSSLESS


def test_lossless_is_the_normal_path_of_a_lossless_policy() -> None:
    assert requested_quality(ask("lossless"), LosslessPolicy) is Quality.BALANCED


class FakeRequest(SimpleNamespace):
    """A `Req`, as far as the hooks go."""

    def __init__(self, prompt: int, max_new_tokens: int | None, params: object = None) -> None:
        super().__init__(
            origin_input_ids=[0] * prompt,
            sampling_params=SimpleNamespace(max_new_tokens=max_new_tokens, custom_params=params),
            extra_key=None,
            to_finish=None,
            kv=SimpleNamespace(holds_kv=False, kv_allocated_len=0, req_pool_idx=None),
        )

    def set_finish_with_abort(self, message: str) -> None:
        self.to_finish, self.origin_input_ids = message, [0]


@pytest.fixture
def scheduler() -> SimpleNamespace:
    return SimpleNamespace(token_to_kv_pool_allocator=make_allocator())


def entered(scheduler: Any, *arguments: Any, extra_key: str | None = None) -> FakeRequest:
    """A request as the scheduler has it after both hooks."""
    request = FakeRequest(*arguments)
    request.extra_key = extra_key
    seam._note(request, scheduler, request)  # type: ignore[arg-type]
    lossless._limit_length(scheduler, request)  # type: ignore[arg-type]
    return request


def test_namespaces(scheduler: SimpleNamespace) -> None:
    keys = [
        entered(scheduler, 5, 5, params, extra_key=key).extra_key
        for params in (None, ask("balanced"), ask("lossless"))
        for key in (None, "tenant")
    ]
    assert keys == [None, "tenant", None, "tenant", "|diffxkv:lossless", "tenant|diffxkv:lossless"]


def test_namespaces_cannot_be_forged(scheduler: SimpleNamespace) -> None:
    """No key that a client gives lets a balanced request into the namespace of a lossless one."""
    lossless, balanced = ask("lossless"), None
    taken = {entered(scheduler, 5, 5, lossless, extra_key=key).extra_key for key in _KEYS}
    assert taken.isdisjoint(
        entered(scheduler, 5, 5, balanced, extra_key=key).extra_key for key in _KEYS
    )


_KEYS = [None, "x", "|diffxkv:lossless", "x|diffxkv:lossless", "x|diffxkv:balanced"]


def test_scheduler_refuses_what_nobody_checked(scheduler: SimpleNamespace) -> None:
    request = entered(scheduler, 5, 5, ask("beautiful"))
    assert "one of: lossless" in request.to_finish and request.extra_key is None


def test_other_pools_are_left_alone() -> None:
    request = FakeRequest(5, 5, ask("beautiful"))
    seam._note(request, SimpleNamespace(token_to_kv_pool_allocator=None), request)  # type: ignore[arg-type]
    assert request.to_finish is None


@pytest.mark.parametrize(("asked", "got"), [(3, 3), (10**6, 40), (None, 40)])
def test_lossless_answers_are_clipped_to_raw_pages(
    scheduler: SimpleNamespace, asked: int | None, got: int
) -> None:
    capacity = scheduler.token_to_kv_pool_allocator.lossless_pages * PAGE_TOKENS
    request = entered(scheduler, capacity - 40, asked, ask("lossless"))
    assert request.sampling_params.max_new_tokens == got and request.to_finish is None
    assert entered(scheduler, capacity - 40, asked).sampling_params.max_new_tokens == asked


def test_lossless_prompts_beyond_raw_pages_are_refused(scheduler: SimpleNamespace) -> None:
    capacity = scheduler.token_to_kv_pool_allocator.lossless_pages * PAGE_TOKENS
    request = entered(scheduler, capacity, 1, ask("lossless"))
    assert f"hold {capacity} tokens here, but the prompt has {capacity}" in request.to_finish
    assert entered(scheduler, capacity, 1).to_finish is None


def test_rows_have_their_requests_quality(scheduler: SimpleNamespace) -> None:
    pool = ReqToTokenPool(4, 64, "cpu", False)
    rows = RequestRows(pool.req_to_token.shape[0], torch.device("cpu"))
    seam.follow_rows(pool, scheduler.token_to_kv_pool_allocator, rows)
    for first, second in (("lossless", "balanced"), ("balanced", "lossless")):
        requests: Any = [entered(scheduler, 5, 5, ask(level)) for level in (first, second)]
        given = pool.alloc(requests)
        seam._enter_rows(given, pool, requests)
        levels = [Quality[level.upper()] for level in (first, second)]
        assert rows.quality[given].tolist() == levels
        assert given is not None
        assert rows.asked and len(rows.running) == 2
        pool.free_rows(given)
        seam._leave_rows(None, pool, given)
        assert not rows.asked and not rows.running
    seam._enter_rows(None, pool, requests)  # there were no rows left
    requests = [entered(scheduler, 5, 5, ask("balanced")) for _ in range(2)]
    seam._enter_rows(pool.alloc(requests), pool, requests)
    assert not rows.asked and not rows.quality.any()
