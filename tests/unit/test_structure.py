# SPDX-License-Identifier: Apache-2.0
"""The product's structure: what may import what, and how long files and signatures get.

Imports count wherever they stand: in functions, and those for type checkers alone, too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sglang_diffxkv"
MOST_LINES, MOST_PARAMETERS = 300, 7

ALLOWED = {
    "kernels": (),
    "policy": ("kernels.layout", "kernels.gpu.transfer"),
    "config": ("policy", "kernels.layout"),
    "pool": (
        "kernels",
        "policy.base",
        "policy.demotion",
        "policy.importance",
        "policy.quality",
        "policy.retention",
    ),
    "offload": ("kernels.layout", "kernels.gpu.transfer", "pool"),
    "attention": ("kernels", "policy.scoring", "pool", "config"),
    "metrics": ("kernels.layout", "policy.quality", "pool"),
    "patches": (
        *("kernels", "policy", "pool", "offload", "attention"),
        *("config", "metrics", "platform"),
    ),
    "plugin": ("kernels", "attention", "patches"),
    "worker_app": ("patches",),
    "platform": (),
    "commands": ("kernels.layout", "policy", "pool.raw_pages", "config", "bundled_model"),
}
"""What each part of the product may import of the others; commands are all that is not listed."""

SGLANG = {
    "kernels": (),
    "policy": (),
    "config": (),
    "metrics": (),
    "pool": ("sglang.srt.mem_cache", "sglang.srt.utils", "sglang.srt.constants"),
    "offload": ("sglang.srt.mem_cache", "sglang.srt.disaggregation.kv_events"),
    "attention": ("sglang.srt.layers", "sglang.srt.model_executor"),
}
"""What some parts may import of SGLang; the others may import anything."""


def product() -> Iterator[tuple[str, Path]]:
    """Modules and their files."""
    for folder, prefix in (("kernels", "kernels."), ("patches", "patches."), (PACKAGE, "")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if folder == PACKAGE and inside.parts[0] in ("kernels", "patches"):
                continue  # as a checkout links them for tools
            names = prefix + ".".join(inside.with_suffix("").parts)
            yield f"{PACKAGE}.{names}".removesuffix(".__init__"), path


FILES = dict(product())


def imported(path: Path) -> set[str]:
    """Modules that a file imports, ours and others'."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: a relative import"
            names = [f"{node.module}.{name.name}" for name in node.names]
            found |= {name if name in FILES else node.module for name in names}
    return found


GRAPH = {module: imported(path) for module, path in FILES.items()}


def part_of(module: str) -> str:
    first = module.removeprefix(f"{PACKAGE}.").split(".")[0]
    return first if first in ALLOWED else "commands"


def is_under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{prefix}.") for prefix in prefixes)


def test_parts_import_what_they_may() -> None:
    assert {part_of(module) for module in FILES} == set(ALLOWED)
    climbs = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others & FILES.keys()
        if part_of(other) != part_of(module)
        and not is_under(other.removeprefix(f"{PACKAGE}."), ALLOWED[part_of(module)])
    ]
    assert climbs == []


def test_sglang_is_imported_where_it_may_be() -> None:
    found = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if is_under(other, ("sglang",))
        and not is_under(other, SGLANG.get(part_of(module), (other,)))
    ]
    assert found == []


def test_hooks_are_registered_in_patches_alone() -> None:
    registry = ("sglang.srt.plugins.hook_registry", "sglang.srt.arg_groups.resolution_hooks")
    users = {
        module for module, others in GRAPH.items() if any(is_under(x, registry) for x in others)
    }
    assert users and {part_of(module) for module in users} == {"patches"}


def test_no_circles() -> None:
    graph = {module: others & FILES.keys() - {module} for module, others in GRAPH.items()}
    TopologicalSorter(graph).prepare()  # names the circle, if there is one


def test_files_are_short() -> None:
    sources = [
        *FILES.values(),
        *(ROOT / "kernels").rglob("*.cpp"),
        *(ROOT / "kernels").rglob("*.h"),
    ]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert len(lines) > 200
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def functions() -> Iterator[tuple[str, int]]:
    """Names of all functions, and their parameters, but for ``self``."""
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = [x.arg for x in given if x.arg not in ("self", "cls")]
                yield f"{module.removeprefix(f'{PACKAGE}.')}.{node.name}", len(names)


def test_signatures_are_short() -> None:
    counts = dict(functions())
    assert len(counts) > 500
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == {}


@pytest.mark.parametrize("part", ["kernels", "policy"])
def test_an_import_that_climbs_would_show(part: str) -> None:
    allowed = ALLOWED[part]
    assert not is_under("pool.store", allowed) and not is_under("patches", allowed)
