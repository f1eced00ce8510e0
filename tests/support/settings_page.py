# SPDX-License-Identifier: Apache-2.0
"""Prints docs/settings.md, from the dataclasses that hold the settings.

python -m tests.support.settings_page > docs/settings.md
"""

import json
from collections.abc import Iterator
from dataclasses import fields

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.policy.settings import PolicySettings

INTRO = """\
# Settings

`--diffxkv-config` takes JSON text or the path of a JSON file, such as `{"target": 4, "sink": 8}`;
without it, the environment variable `DIFFXKV_CONFIG` is read. Unknown keys and values out of range
are refused at start, in one line that says what is allowed. The keys lie flat in one object,
whatever they belong to; [policies.md](policies.md) has what the policies make of them.

This page is generated from the dataclasses: `python -m tests.support.settings_page`.
"""


def page() -> str:
    """Markdown: a table of the settings of every policy, of each that has its own, of the pool."""
    owners = [x for x in reversed(DiffXKVConfig.__mro__) if issubclass(x, PolicySettings)]
    return "\n".join([INTRO, *("\n".join(_section(owner)) for owner in owners)])


def _section(owner: type[PolicySettings]) -> Iterator[str]:
    title = (owner.__doc__ or "").partition("\n")[0].rstrip(".")
    yield from (f"## {title}", "", "| key | default | meaning |", "|---|---|---|")
    defaults = json.loads(DiffXKVConfig().to_json())
    described = owner.__pydantic_fields__  # type: ignore[attr-defined]
    for field in fields(owner):
        if field.name in owner.__annotations__:
            meaning = " ".join(described[field.name].description.split())
            yield f"| `{field.name}` | `{json.dumps(defaults[field.name])}` | {meaning} |"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
