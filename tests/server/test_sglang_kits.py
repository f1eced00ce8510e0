# SPDX-License-Identifier: Apache-2.0
"""SGLang's own test kits, from the installed package, on a server of ours.

Those that ask a model for facts, or JSON that a random model never ends, do not fit.
"""

import json
import random
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.test.kits.abort_timeout_kit import AbortAllMixin
from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin
from sglang.test.kits.basic_decode_correctness_kit import BasicDecodeCorrectnessMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin
from sglang.test.kits.radix_cache_server_kit import gen_radix_tree

from tests.support.harness import Server
from tests.support.workload import assert_healthy

VOCABULARY = 320


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    config = {"memory_bytes": "48MiB", "raw_share": 0.3}
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    args += ["--chunked-prefill-size", 256]
    env = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
    with Server(model, *args, env=env) as server:
        yield server
        assert_healthy(server)


class _OnServer(unittest.TestCase):
    base_url: str
    process: Any

    @pytest.fixture(autouse=True)
    def _server(self, server: Server) -> None:
        self.base_url = server.url
        self.process = SimpleNamespace(poll=lambda: None if server.is_alive() else 1)


class TestEndpoints(BasicAPIContractMixin, _OnServer):  # type: ignore[misc]
    pass


class TestAbort(AbortAllMixin, _OnServer):  # type: ignore[misc]
    abort_all_max_new_tokens = 4000  # of 8,192 that the model has
    abort_all_sleep = 1


class TestPause(PauseResumeInPlaceMixin, _OnServer):  # type: ignore[misc]
    pause_num_requests = 16
    pause_max_new_tokens = 200
    pause_duration = 1
    pause_ignore_eos = True


class TestDecode(_OnServer):
    _decode_generate = BasicDecodeCorrectnessMixin._decode_generate
    sanity_max_new_tokens_short = BasicDecodeCorrectnessMixin.sanity_max_new_tokens_short
    test_determinism_temp_zero = BasicDecodeCorrectnessMixin.test_determinism_temp_zero
    test_max_token_one = BasicDecodeCorrectnessMixin.test_max_token_one


def test_radix_tree(server: Server) -> None:
    """`run_radix_attention_test` with fewer nodes, and tokens that the model has."""
    random.seed(11)
    nodes = gen_radix_tree(num_nodes=50, chunk_len=160)
    body = {
        "input_ids": [[token % VOCABULARY for token in node["input_ids"]] for node in nodes],
        "sampling_params": [
            {"max_new_tokens": node["decode_len"], "temperature": 0} for node in nodes
        ],
    }
    assert len(server.post("/generate", body).json()) == len(nodes)


def test_scores_equal_stock(stock_server: Server, server: Server) -> None:
    body = {
        "query": "Is this a city? ",
        "items": ["Paris", "Spoon", "A long item, so that it has pages of its own. " * 5],
        "label_token_ids": [89, 78, 65],
        "apply_softmax": True,
        "model": "default",
    }
    server.flush_cache()  # nothing sealed is read
    got, expected = (x.post("/v1/score", body).json()["scores"] for x in (server, stock_server))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
