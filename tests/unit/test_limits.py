# SPDX-License-Identifier: Apache-2.0
"""docs/limits.md says what is refused: every flag, variable and kind of model of the tables."""

from pathlib import Path

import pytest
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs
from sglang.srt.server_args import ServerArgs

from sglang_diffxkv.patches.model_validation import HEAD_DIMS, kinds_of
from sglang_diffxkv.patches.validation import _FLAGS, _VARIABLES, _Flag
from sglang_diffxkv.policy.registry import POLICIES
from tests.support.demo_model import write_demo_model

LIMITS = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()


def row(flag: _Flag) -> str:
    default = flag.allowed[-1]
    use = "" if default in (None, False, "null", "none") else f"`{default}`"
    return f"| `--{flag.field.replace('_', '-')}` | {use} | {flag.why} |"


@pytest.mark.parametrize("flag", _FLAGS, ids=lambda flag: flag.field)
def test_every_refused_flag_has_its_row(flag: _Flag) -> None:
    assert row(flag) in LIMITS.splitlines()
    assert flag.field in ServerArgs.__struct_fields__


def test_no_row_is_left_over() -> None:
    rows = [line for line in LIMITS.splitlines() if line.startswith("| `--")]
    assert len(rows) == len(_FLAGS)


@pytest.mark.parametrize("name", _VARIABLES)
def test_every_refused_variable(name: str) -> None:
    assert f"- `{name}`: {_VARIABLES[name]}" in LIMITS.splitlines()
    assert hasattr(envs, name)


def test_every_kind_of_model(tmp_path: Path) -> None:
    kinds = kinds_of(ModelConfig(str(write_demo_model(tmp_path, layers=1))))
    assert not any(kinds.values())
    listed = [line.removeprefix("- ") for line in LIMITS.splitlines() if line.startswith("- ")]
    assert [line for line in listed if line in kinds] == list(kinds)
    dims = [str(dim) for dim in HEAD_DIMS]
    assert f"head_dim {', '.join(dims[:-1])} or {dims[-1]}" in LIMITS.replace("\n", " ")


CAPABILITIES = (
    *("may_share", "streams", "needs_scores"),
    *("grades_quality", "can_demote", "is_lossless"),
)


@pytest.mark.parametrize("name", POLICIES)
def test_what_policies_go_with(name: str) -> None:
    can = ("yes" if getattr(POLICIES[name], x) else "no" for x in CAPABILITIES)
    table = (Path(__file__).parents[2] / "docs" / "policies.md").read_text().splitlines()
    assert f"| `{name}` | {' | '.join(can)} |" in table
