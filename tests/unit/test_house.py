# SPDX-License-Identifier: Apache-2.0
"""What tests and benches share lies in `tests/support`: neither imports a module of tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> Iterator[str]:
    """Modules and names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_no_test_is_imported() -> None:
    files = [path for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    of_tests = [(str(path), x) for path in files for x in imported(path) if x.startswith("tests")]
    assert of_tests
    assert [(path, x) for path, x in of_tests if not x.startswith("tests.support.")] == []
