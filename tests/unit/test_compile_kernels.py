# SPDX-License-Identifier: Apache-2.0
"""Compiling without a GPU: what is compiled, and what is read from the machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.occupancy import ARCHITECTURES, Occupancy, occupancy
from bench.gpu.predict import predict
from bench.gpu.sass import Code, Loop, find_loops, parse
from bench.gpu.tiles import Tile

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """What `toy_kernels` prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "from tests.unit.toy_kernels import main; main()"]
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def by_case(compiled: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {result["cases"][0]: result for result in compiled["results"]}


def test_launches_that_compile_alike_are_compiled_once(compiled: dict[str, Any]) -> None:
    assert [result["cases"] for result in compiled["results"]] == [
        ["sound", "sound again"], ["no loop"], ["spilling"], ["too much shared memory"], ["wrong"],
    ]  # fmt: skip


def test_sound_code_is_read(by_case: dict[str, dict[str, Any]]) -> None:
    sound = by_case["sound"]
    assert sound["problems"] == []
    assert 64 <= sound["code"]["registers"] <= 255
    assert sound["shared"] >= 2 * 64 * 128  # a tile of keys
    assert sound["occupancy"]["warps"] == 4 * sound["occupancy"]["blocks"] > 0
    assert sound["constants"] == {"M": 16, "N": 64, "D": 128, "unused": None}
    (loop,) = sound["code"]["loops"]
    assert loop["inner"] == [] and loop["tensor"] > 0
    assert 32 <= loop["instructions"] < sound["code"]["whole"]["instructions"]
    # Both products of a tile, shared by four warps that each compute all heads' rows: no waste.
    assert loop["tensor_flops"] * 4 == 2 * (2 * 16 * 64 * 128)
    assert loop["load_bytes"] * 4 == 2 * 64 * 128
    assert by_case["no loop"]["code"]["loops"] == []


def test_spills_are_a_problem(by_case: dict[str, dict[str, Any]]) -> None:
    spilling = by_case["spilling"]
    assert spilling["code"]["spill_stores"] > 0 and spilling["code"]["spill_loads"] > 0
    assert any("spills" in problem for problem in spilling["problems"])


def test_too_much_shared_memory_is_a_problem(by_case: dict[str, dict[str, Any]]) -> None:
    result = by_case["too much shared memory"]
    assert result["shared"] > 227 << 10 and result["occupancy"]["blocks"] == 0
    assert f"{result['shared']} bytes of shared memory of {227 << 10}" in result["problems"]


def test_what_does_not_compile_is_a_problem(
    compiled: dict[str, Any], by_case: dict[str, dict[str, Any]]
) -> None:
    assert by_case["wrong"]["code"] is None and len(by_case["wrong"]["problems"]) == 1
    assert "does not compile" in compiled["tables"]
    prefix = "unit.wrong (wrong, 1 warps) on sm_90: ValueError: "
    assert any(p.startswith(prefix) and "shape" in p for p in compiled["problems"])


def test_specialisation_is_that_of_tritons_jit(compiled: dict[str, Any]) -> None:
    rows = compiled["specialisations"]
    assert len({row["ours"] for row in rows}) == len(rows)  # the arguments make a difference
    for row in rows:
        assert row["ours"] == row["jit"]
        assert all(row["options"].values())


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
                                                                 /* 0x000fe20000000f00 */
        /*0010*/              @!P0 BRA 0xa0 ;                    /* 0x0 */
        /*0020*/                   LDG.E.128.CONSTANT R4, [R2] ; /* 0x0 */
        /*0030*/                   HMMA.16816.F32 R4, R4, R8, RZ ; /* 0x0 */
        /*0040*/                   LDG.E.U8 R4, [R2.64] ;        /* 0x0 */
        /*0050*/               @P1 BRA 0x40 ;                    /* 0x0 */
        /*0060*/                   BRA.DIV UR4, 0xb0 ;           /* 0x0 */
        /*0070*/                   IADD3 R2, R2, 0x1, RZ ;       /* 0x0 */
        /*0080*/                   BRA.U !UP0, 0x20 ;            /* 0x0 */
        /*0090*/                   STL [R1], R2 ;                /* 0x0 */
        /*00a0*/                   EXIT ;                        /* 0x0 */
        /*00b0*/                   IMMA.16832.S8.S8 R4, R4, R8, RZ ; /* 0x0 */
        /*00c0*/                   BRA 0x70 ;                    /* 0x0 */
        /*00d0*/                   BRA 0xd0;                     /* 0x0 */
        /*00e0*/                   NOP;                          /* 0x0 */
"""


def test_loops_of_a_listing() -> None:
    program = parse(LISTING)
    assert [i.opcode for i in program[:3]] == ["MOV", "BRA", "LDG.E.128.CONSTANT"]
    assert len(program) == 13  # neither the trap nor the padding
    outer, inner = find_loops(program)
    assert (outer.start, outer.instructions, outer.inner) == (2, 7, [4])
    assert (inner.start, inner.instructions, inner.inner) == (4, 2, [])
    assert outer.tensor == 1 and outer.tensor_flops == 2 * 16 * 8 * 16
    assert (outer.load_bytes, inner.load_bytes) == (32 * 17, 32)
    # The inner loop uses no tensor cores: it might wait for something.
    assert Code(32, 0, 0, 0, outer, [outer, inner]).main_loops == [outer]
    assert Code(32, 0, 0, 0, outer, [inner]).main_loops == [inner]
    assert inner.mix == {"LDG": 1, "BRA": 1}


def test_occupancy() -> None:
    hopper, ada = ARCHITECTURES["sm_90"], ARCHITECTURES["sm_89"]
    # 168 registers: 12 warps at most, as each quarter of the register file holds 3.
    assert occupancy(hopper, num_warps=4, registers=168, shared=0) == Occupancy(3, 12, "registers")
    assert occupancy(hopper, num_warps=1, registers=16, shared=0) == Occupancy(32, 32, "blocks")
    assert occupancy(ada, num_warps=8, registers=32, shared=0) == Occupancy(6, 48, "warps")
    # A block takes one kilobyte more than it asks for.
    assert occupancy(hopper, num_warps=4, registers=32, shared=113 << 10).blocks == 2
    assert occupancy(hopper, num_warps=4, registers=32, shared=114 << 10).blocks == 1
    assert occupancy(hopper, num_warps=4, registers=32, shared=228 << 10).blocks == 0
    assert occupancy(hopper, num_warps=4, registers=32, shared=0, tensor_columns=256).blocks == 2


def test_floors_on_a_gpu() -> None:
    tile = Tile("K8V4", tokens=64, elements=2 * 64 * 128, bytes=64 * 200)
    loop = Loop(0, 750, [], 8, 2 * 2 * 64 * 128 * 8 // 2, 64 * 200 // 2, {})
    found = predict(tile, loop, num_warps=2)
    assert found.per_element == 750 * 2 * 32 / (2 * 64 * 128)
    assert found.loads == 1
    assert found.bytes == pytest.approx(200 / 4.3)  # 4.3 bytes per picosecond
    assert found.issue == pytest.approx(750 * 2 / 64 / (4 * 132 * 1.755e-3))
    assert found.tensor == pytest.approx(2 * 2 * 128 * 8 / (0.62 * 4096 * 132 * 1.755e-3))
    assert (found.limit, found.share[1]) == ("bytes", 1.0)
    twice = predict(tile._replace(iterations=2), loop, num_warps=2)
    assert (twice.bytes, twice.issue, twice.loads) == (found.bytes, 2 * found.issue, 2)
    busy = predict(tile, loop._replace(instructions=4 * 750), num_warps=2)
    assert busy.limit == "issue" and busy.share[0] == pytest.approx(busy.bytes / busy.issue)
    assert busy.share[1] == pytest.approx(busy.share[0] * 1.98 / 1.755)
