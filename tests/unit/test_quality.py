# SPDX-License-Identifier: Apache-2.0
"""What requests may ask for, and how the scheduler treats lossless ones; no server."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from fastapi.routing import APIRoute, APIWebSocketRoute
from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches import lossless
from sglang_diffxkv.patches import quality as hook
from sglang_diffxkv.patches import running as running_hook
from sglang_diffxkv.patches.asked import (
    Asked,
    QualityError,
    agreed,
    asked_in_headers,
    asked_in_model,
    asked_in_params,
    requested_quality,
    with_quality,
)
from sglang_diffxkv.patches.http_app import ASKED
from sglang_diffxkv.policy.methods.diffkv import DiffKVPolicy
from sglang_diffxkv.policy.methods.lossless import LosslessPolicy
from sglang_diffxkv.policy.quality import Quality
from tests.support.stores import make_allocator


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


@pytest.mark.parametrize("name", ["X-DiffXKV-Quality", "x-diffxkv-quality"])
def test_headers(name: str) -> None:
    headers = [("content-type", "text"), ("x-image-quality", "80"), (name, " high ")]
    asked = asked_in_headers(headers, GradingPolicy)
    assert asked == Asked("high", "X-DiffXKV-Quality")
    assert asked_in_headers([*headers, (name, "high")], GradingPolicy) == asked
    assert asked_in_headers(headers[:2], GradingPolicy) is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("X-DiffXKV-Quality", "hihg", "X-DiffXKV-Quality = 'hihg' is not allowed; did you mean"),
        ("X-DiffXKV-Quality", "", "X-DiffXKV-Quality = '' is not allowed; one of"),
        ("X-DiffXKV-Quality", "high, small", "is not allowed"),
        ("X-DiffXKV-Qualty", "high", "'X-DiffXKV-Qualty'; did you mean 'X-DiffXKV-Quality'?"),
        ("diffxkv", "high", "unknown header 'diffxkv'"),
        ("X-DiffKV-Quality", "high", "did you mean 'X-DiffXKV-Quality'?"),
    ],
)
def test_mistakes_in_headers(name: str, value: str, text: str) -> None:
    with pytest.raises(QualityError) as refusal:
        asked_in_headers([(name, value)], GradingPolicy)
    assert text in str(refusal.value)


@pytest.mark.parametrize(
    ("model", "name", "level"),
    [
        ("default", "default", None),
        ("default:diffxkv=small", "default", "small"),
        ("s3://a/b:adapter:diffxkv=lossless", "s3://a/b:adapter", "lossless"),
        ("llama3:8b", "llama3:8b", None),
        ("base:adapter", "base:adapter", None),
        ("base:rank=8", "base:rank=8", None),
        ("diffxkv=small", "diffxkv=small", None),
    ],
)
def test_model_names(model: str, name: str, level: str | None) -> None:
    asked = None if level is None else Asked(level, "model ':diffxkv'")
    assert asked_in_model(model, GradingPolicy) == (name, asked)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("default:diffxkv=hihg", "model ':diffxkv' = 'hihg' is not allowed; did you mean 'high'?"),
        (
            "default:diffkv=high",
            "unknown part 'diffkv=high'; did you mean ':diffxkv=…' at its end?",
        ),
        ("default:diffxkv:high", "unknown part 'diffxkv'; did you mean"),
        ("default:diffxkv=high:adapter", "unknown part 'diffxkv=high'; did you mean"),
        ("a:diffxkv=high:diffxkv=high", "unknown part 'diffxkv=high'; did you mean"),
    ],
)
def test_mistakes_in_model_names(model: str, text: str) -> None:
    with pytest.raises(QualityError) as refusal:
        asked_in_model(model, GradingPolicy)
    assert text in str(refusal.value)


def test_what_is_said_twice_must_agree() -> None:
    header, model = Asked("high", "header"), Asked("high", "model")
    assert agreed(None, header, None, model) == header
    assert agreed(None, None) is None
    with pytest.raises(QualityError, match="header = 'high' and model = 'small' do not agree"):
        agreed(header, None, model._replace(level="small"))


def test_what_was_asked_becomes_a_parameter() -> None:
    asked = Asked("small", "header")
    assert with_quality(None, asked) == ask("small")
    params = {"bias": 2, "diffxkv": {}}
    assert with_quality(params, asked) == {"bias": 2} | ask("small")
    assert params == {"bias": 2, "diffxkv": {}}
    assert asked_in_params(with_quality(None, asked), GradingPolicy) == Asked(
        "small", "custom_params.diffxkv.quality"
    )


class FakeRequest(SimpleNamespace):
    """A `Req`, as far as the hooks go."""

    def __init__(self, prompt: int, max_new_tokens: int | None, params: object = None) -> None:
        super().__init__(
            origin_input_ids=[0] * prompt,
            sampling_params=SimpleNamespace(max_new_tokens=max_new_tokens, custom_params=params),
            extra_key=None,
            cache_salt=None,
            to_finish=None,
            kv=SimpleNamespace(holds_kv=False, kv_allocated_len=0, req_pool_idx=None),
        )

    def set_finish_with_abort(self, message: str) -> None:
        self.to_finish, self.origin_input_ids = message, [0]


@pytest.fixture
def scheduler() -> SimpleNamespace:
    return SimpleNamespace(token_to_kv_pool_allocator=make_allocator())


def entered(scheduler: Any, *arguments: Any, salt: str | None = None) -> FakeRequest:
    """A request as the scheduler has it after both hooks."""
    request = FakeRequest(*arguments)
    request.extra_key, request.cache_salt = "theirs", salt
    hook._note(request, scheduler, request)  # type: ignore[arg-type]
    lossless._limit_length(scheduler, request)  # type: ignore[arg-type]
    return request


def test_namespaces(scheduler: SimpleNamespace) -> None:
    requests = [
        entered(scheduler, 5, 5, params, salt=salt)
        for params in (None, ask("balanced"), ask("lossless"))
        for salt in (None, "tenant")
    ]
    salts = [request.cache_salt for request in requests]
    plain = [None, "tenant"]
    assert salts == [*plain, *plain, "|diffxkv:lossless", "tenant|diffxkv:lossless"]
    assert {request.extra_key for request in requests} == {"theirs"}


def test_namespaces_cannot_be_forged(scheduler: SimpleNamespace) -> None:
    """No salt that a client gives lets a balanced request into the namespace of a lossless one."""
    lossless, balanced = ask("lossless"), None
    taken = {entered(scheduler, 5, 5, lossless, salt=salt).cache_salt for salt in _SALTS}
    assert taken.isdisjoint(
        entered(scheduler, 5, 5, balanced, salt=salt).cache_salt for salt in _SALTS
    )


def test_namespaces_can_be_named(scheduler: SimpleNamespace) -> None:
    """As a gateway does that looks for blocks by the salt which their events carry."""
    named = entered(scheduler, 5, 5, ask("lossless"), salt="x|diffxkv:lossless")
    assert named.cache_salt == entered(scheduler, 5, 5, ask("lossless"), salt="x").cache_salt


_SALTS = [None, "x", "|diffxkv:lossless", "x|diffxkv:lossless", "x|diffxkv:balanced"]


def test_scheduler_refuses_what_nobody_checked(scheduler: SimpleNamespace) -> None:
    request = entered(scheduler, 5, 5, ask("beautiful"))
    assert "one of: lossless" in request.to_finish and request.cache_salt is None


def test_other_pools_are_left_alone() -> None:
    request = FakeRequest(5, 5, ask("beautiful"))
    hook._note(request, SimpleNamespace(token_to_kv_pool_allocator=None), request)  # type: ignore[arg-type]
    assert request.to_finish is None


@pytest.mark.parametrize(("asked", "got"), [(3, 3), (10**6, 40), (None, 40)])
def test_lossless_answers_are_clipped_to_raw_pages(
    scheduler: SimpleNamespace, asked: int | None, got: int
) -> None:
    capacity = scheduler.token_to_kv_pool_allocator.capacity.lossless_pages * PAGE_TOKENS
    request = entered(scheduler, capacity - 40, asked, ask("lossless"))
    assert request.sampling_params.max_new_tokens == got and request.to_finish is None
    assert entered(scheduler, capacity - 40, asked).sampling_params.max_new_tokens == asked


def test_lossless_prompts_beyond_raw_pages_are_refused(scheduler: SimpleNamespace) -> None:
    capacity = scheduler.token_to_kv_pool_allocator.capacity.lossless_pages * PAGE_TOKENS
    request = entered(scheduler, capacity, 1, ask("lossless"))
    assert f"hold {capacity} tokens here, but the prompt has {capacity}" in request.to_finish
    assert entered(scheduler, capacity, 1).to_finish is None


def test_running_requests_have_their_quality(scheduler: SimpleNamespace) -> None:
    pool = ReqToTokenPool(4, 64, "cpu", False)
    allocator = scheduler.token_to_kv_pool_allocator
    running = allocator.running
    running_hook.follow(pool, allocator)
    for first, second in (("lossless", "balanced"), ("balanced", "lossless")):
        requests: Any = [entered(scheduler, 5, 5, ask(level)) for level in (first, second)]
        given = pool.alloc(requests)
        running_hook._enter(given, pool, requests)
        levels = [Quality[level.upper()] for level in (first, second)]
        assert given is not None
        assert [running.by_index[index].quality for index in given] == levels
        asked = running.commit(given, torch.tensor([0, 0]), torch.tensor([1, 1])).asked
        assert asked is not None and asked.quality == [Quality.LOSSLESS]
        assert len(running.by_index) == 2
        pool.free_rows(given)
        running_hook._leave(None, pool, given)
        nobody = torch.empty(0, dtype=torch.int64)
        assert running.commit([], nobody, nobody).asked is None and not running.by_index
    running_hook._enter(None, pool, requests)  # there were no rows left
    requests = [entered(scheduler, 5, 5, ask("balanced")) for _ in range(2)]
    running_hook._enter(pool.alloc(requests), pool, requests)
    assert running.commit([], nobody, nobody).asked is None


@pytest.fixture
def settle(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`settle(own, preferred, header)`: the parameters of a request, once it is tokenized."""
    monkeypatch.setattr(hook, "is_active", lambda: True)
    monkeypatch.setattr(hook, "server_policy", lambda: GradingPolicy)

    def run(own: Any, preferred: Any = None, header: str | None = None, kind: Any = None) -> Any:
        token = ASKED.set(None if header is None else Asked(header, "header"))
        params = SimpleNamespace(custom_params=preferred if own is None else own)
        result = (kind or SimpleNamespace)(sampling_params=params)
        try:
            hook._settle(result, None, SimpleNamespace(sampling_params={"custom_params": own}))
        finally:
            ASKED.reset(token)
        return params.custom_params

    yield run


def test_what_a_request_says_becomes_its_parameter(settle: Callable[..., Any]) -> None:
    assert settle(None) is None
    assert settle({"bias": 1}) == {"bias": 1}
    assert settle(ask("high")) == ask("high") == settle(ask("high"), header="high")
    assert settle({"bias": 1}, header="small") == {"bias": 1} | ask("small")
    assert settle(None, preferred=ask("small")) == ask("small")
    assert settle(None, preferred=ask("small"), header="high") == ask("high")
    for arguments in ({"own": ask("high"), "header": "small"}, {"own": ask("losless")}):
        with pytest.raises(QualityError):
            settle(**arguments)


def test_what_does_not_generate_has_no_quality(settle: Callable[..., Any]) -> None:
    kind = partial(
        TokenizedEmbeddingReqInput, input_text="", input_ids=[1], mm_inputs=None, token_type_ids=[]
    )
    assert settle(None, kind=kind) is None
    assert settle(None, header="balanced", kind=kind) == ask("balanced")
    for arguments in ({"own": ask("lossless")}, {"own": None, "header": "high"}):
        with pytest.raises(QualityError, match="only what generates has a quality"):
            settle(**arguments, kind=kind)


def test_docs_name_the_endpoints_that_take_prompts() -> None:
    from sglang.srt.entrypoints.http_server import app

    docs = Path(__file__).parents[2] / "docs" / "quality.md"
    table = docs.read_text().split("| endpoint |")[1].split("| all others |")[0]
    named = set(re.findall(r"`(/[^`]+)`", table))
    served = {
        route.path
        for route in app.routes
        if isinstance(route, APIWebSocketRoute)
        or (isinstance(route, APIRoute) and route.methods != {"GET"})
    }
    assert named <= served
    prompts = {path for path in served if path.startswith(("/v1/", "/api/")) and "show" not in path}
    assert prompts <= named, "SGLang serves an endpoint that the table lacks"
