# SPDX-License-Identifier: Apache-2.0
"""Which servers an evaluation starts, and which answers it refuses to count."""

import io
import json
import logging
import sys
from pathlib import Path

import pytest

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.eval.ask import CacheError
from sglang_diffxkv.eval.model import load_model
from sglang_diffxkv.eval.options import Options
from sglang_diffxkv.eval.progress import Progress
from sglang_diffxkv.eval.questions.answers import Answer, check_cached, count_requests
from sglang_diffxkv.eval.questions.prompts import Prompt, make_cells
from sglang_diffxkv.eval.servers import Servers
from sglang_diffxkv.eval.tasks.base import Question
from sglang_diffxkv.eval.variants import Variant, make_variants

MODEL = load_model(BUNDLED)


def options(**changes: object) -> Options:
    lengths = [1024, 2048]
    plain = Options(
        Path("model"), ["int8", "diffkv"], ["vt"], lengths, 1, 0, "cpu", [], "float32", "words"
    )
    return plain._replace(**changes)


def test_full_kv_comes_first_and_once():
    names = [v.name for v in make_variants(options(policies=["int8", "full", "int8"]), MODEL)]
    assert names == ["full", "int8"]


def test_targets_are_met_for_each_length_by_a_server_of_its_own():
    found = make_variants(options(targets=[3.0, 4.0]), MODEL)
    assert [(v.name, v.target, v.length) for v in found] == [
        ("full", None, None),
        ("int8", None, None),
        *(("diffkv", target, length) for target in (3.0, 4.0) for length in (1024, 2048)),
    ]
    assert len({v.config for v in found}) == 6


def test_a_target_out_of_reach_is_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        found = make_variants(options(policies=["streaming"], targets=[3.0, 40.0]), MODEL)
    assert [(v.target, v.length) for v in found[1:]] == [(3.0, 1024), (3.0, 2048)]
    assert "cannot reach a compression of 40" in caplog.text


def test_requests_are_counted_before_they_are_sent():
    tasks = ["niah_single", "shared_prefix"]
    single, shared = make_cells(MODEL.tokenizer, tasks, [600], samples=20, seed=0)
    assert count_requests(single, is_forced=False) == 20 + 20
    assert count_requests(single, is_forced=True) == 20 + 2 * 20
    # Seven questions a document, sixteen at once: the third document's come in two batches.
    assert count_requests(shared, is_forced=False) == 3 + 1 + 20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_progress(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(3) as progress:
        progress.describe("full: vt")
        for _ in range(3):
            progress.advance()
        progress.line("full: accuracy 90%")
    shown = stream.getvalue()
    assert "full: accuracy 90%\n" in shown
    if stream.isatty():
        assert "full: vt" in shown and "3/3" in shown
    else:
        assert shown == "full: accuracy 90%\n"


def test_fp32_pools_have_room_for_as_many_tokens():
    sizes = []
    for dtype in ("bfloat16", "float32"):
        model = MODEL._replace(dtype=dtype)
        variant = Variant("diffxkv", DiffXKVConfig(target=4.0))
        arguments = Servers(model, "cpu", longest=500, at_once=16).arguments(variant)
        assert arguments[arguments.index("--dtype") + 1] == dtype
        config = json.loads(str(arguments[-1]))
        sizes.append(config["memory_bytes"])
        assert config["target"] == {"bfloat16": 4, "float32": 8}[dtype]
    assert sizes[1] == 2 * sizes[0]


def test_answers_must_come_from_the_cache():
    question = Question("?", "a", ("a",))
    prompt = Prompt([*range(200), 7], [*range(200), 8, 9], question, 0, "0", 1)
    check_cached(prompt, Answer("a", [1], [], 192))
    with pytest.raises(CacheError, match=r"of 200 tokens .* only 191"):
        check_cached(prompt, Answer("a", [1], [], 191))
    # The last token is always computed: of two equal prompts of whole pages, the last page is.
    whole = prompt._replace(warm=[*range(128)], ids=[*range(128)])
    check_cached(whole, Answer("a", [1], [], 64))
