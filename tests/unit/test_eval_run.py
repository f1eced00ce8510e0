# SPDX-License-Identifier: Apache-2.0
"""Which servers an evaluation starts, and which answers it refuses to count."""

import logging
from pathlib import Path

import pytest

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.eval.ask import Answer, CacheError, check_cached
from sglang_diffxkv.eval.prompts import Prompt
from sglang_diffxkv.eval.run import Options, load_model, make_variants
from sglang_diffxkv.eval.tasks.base import Question

MODEL = load_model(BUNDLED)


def options(**changes: object) -> Options:
    plain = Options(Path("model"), ["int8", "diffkv"], ["vt"], [1024, 2048], 1, 0, "cpu", [], "float32", None)
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


def test_answers_must_come_from_the_cache():
    question = Question("?", "a", ("a",))
    prompt = Prompt([*range(200), 7], [*range(200), 8, 9], question, 0, "0", 1)
    check_cached(prompt, Answer("a", [1], [], 192))
    with pytest.raises(CacheError, match=r"of 200 tokens .* only 191"):
        check_cached(prompt, Answer("a", [1], [], 191))
    # The last token is always computed: of two equal prompts of whole pages, the last page is.
    whole = prompt._replace(warm=[*range(128)], ids=[*range(128)])
    check_cached(whole, Answer("a", [1], [], 64))
