# SPDX-License-Identifier: Apache-2.0
"""Policies of other packages, found by entry point; the example of docs/policies.md is one."""

import re
import sys
from pathlib import Path

import pytest
import torch

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.kernels.layout import HIGH, PRUNED
from sglang_diffxkv.policy.registry import POLICIES, policy_class
from sglang_diffxkv.policy.scoring import last_queries, sample_queries, spread_queries
from tests.support.contexts import SHAPE, context
from tests.support.policies import Shape, config_of, policy_of

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, points: str) -> None:
    """A package as an installer leaves it: a module, and metadata that names its entry points."""
    (folder / "acme_policies.py").write_text(code)
    info = folder / "acme_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-policies\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sglang_diffxkv.policies]\n{points}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "acme_policies", raising=False)


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    assert len(code.splitlines()) <= 30
    install(tmp_path, monkeypatch, code, "alternate = acme_policies:AlternatePolicy")
    policy = policy_of(DiffXKVConfig(policy="alternate"), SHAPE)
    tiers = policy.assign(context())
    assert (tiers[:, 0] == HIGH).all()
    assert (tiers[:, 1] == PRUNED).any()
    assert (tiers[0, ..., :4] == HIGH).all()
    assert "alternate" not in POLICIES
    with pytest.raises(ConfigError, match="did you mean 'alternate'"):
        policy_class("alternat")


@pytest.mark.parametrize(
    ("code", "message"),
    [("import no_such_module_anywhere", "cannot be loaded: No module"), ("Mine = 3", "not a Tier")],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    install(tmp_path, monkeypatch, code, "mine = acme_policies:Mine")
    with pytest.raises(ConfigError, match=message):
        policy_class("mine")


SETTLED = """
from sglang_diffxkv.policy.budgeting.target import TargetSettings
from sglang_diffxkv.policy.methods.uniform import UniformPolicy

class Plain(UniformPolicy):
    name = "plain"

class Targeted(UniformPolicy):
    name, settings = "targeted", TargetSettings
"""


def test_settings_are_those_that_a_policy_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = "plain = acme_policies:Plain\ntargeted = acme_policies:Targeted"
    install(tmp_path, monkeypatch, SETTLED, points)
    config = DiffXKVConfig(policy="targeted", target=4.0)
    assert policy_of(config, SHAPE).config == config
    for refused in (
        DiffXKVConfig(policy="plain", target=4.0),
        DiffXKVConfig(policy="targeted", target=4.0, high_layers=(0,)),
    ):
        with pytest.raises(ConfigError, match=f"{refused.policy!r} has no use for") as caught:
            policy_of(refused, SHAPE)
        assert "diffxkv" not in str(caught.value)


def test_ours_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "diffxkv = 3", "diffxkv = acme_policies:diffxkv")
    assert policy_class("diffxkv") is POLICIES["diffxkv"]


def test_who_scores() -> None:
    """The default policy listens to a chunk's end and to the rest, baselines to the end alone."""
    samplers = {"diffxkv": spread_queries, "diffkv": sample_queries}
    samplers |= dict.fromkeys(("snapkv", "xkv"), last_queries)
    for name, sampler in samplers.items():
        policy = policy_of(config_of(name), Shape(layers=3, heads=2))
        got, expected = policy.sample([100, 7], 8), sampler([100, 7], 8)
        assert torch.equal(got.rows, expected.rows), name


def test_declarations() -> None:
    declared = {
        name: (policy.streams, policy.may_share, policy.can_demote, policy.grades_quality)
        for name, policy in POLICIES.items()
    }
    assert declared["diffxkv"] == (True, True, True, True)
    assert declared["snapkv"] == declared["xkv"] == (False, False, False, False)
