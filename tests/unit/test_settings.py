# SPDX-License-Identifier: Apache-2.0
"""The page of settings is that of the dataclasses, and policies read what they declare."""

from dataclasses import fields
from pathlib import Path

import pytest

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.policy.registry import POLICIES
from tests.support.settings_page import page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), (
        "run: python -m tests.support.settings_page > docs/settings.md"
    )


def test_every_setting_is_described_once() -> None:
    rows = [line.split(" | ")[0] for line in page().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(f"| `{field.name}`" for field in fields(DiffXKVConfig))


@pytest.mark.parametrize("name", POLICIES)
def test_the_configuration_has_the_settings_of_every_policy(name: str) -> None:
    assert issubclass(DiffXKVConfig, POLICIES[name].settings)
