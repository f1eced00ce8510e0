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

from bench.gpu.compile.__main__ import Compiled, sampled, verdict
from bench.gpu.compile.built import Built, as_json, differences, from_json
from bench.gpu.compile.code import Code, Loop
from bench.gpu.compile.occupancy import ARCHITECTURES, Occupancy, occupancy
from bench.gpu.compile.predict import predict, turn_cycles
from bench.gpu.compile.report import folded
from bench.gpu.compile.sass import NO_CONTROL, Instruction, find_loops, parse
from bench.gpu.compile.stalls import BARRIER, LOAD, TABLE, Stalls, of_loop
from bench.gpu.compile.tiles import Tile

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """What `toy_kernels` prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "from tests.support.toy_kernels import main; main()"]
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
        ["not prefetched"], ["prefetched by two"], ["chain"],
    ]  # fmt: skip


def test_sound_code_is_read(by_case: dict[str, dict[str, Any]]) -> None:
    sound = by_case["sound"]
    assert sound["problems"] == []
    assert 64 <= sound["code"]["registers"] <= 255
    assert sound["shared"] >= 2 * 64 * 128  # a tile of keys
    assert sound["occupancy"]["warps"] == 4 * sound["occupancy"]["blocks"] > 0
    constants = {"N": 64, "SHAPE.queries": 16, "SHAPE.dim": 128, "unused": None}
    assert sound["constants"] == constants
    assert sound["signature"]["k.data"] == "*fp16" and sound["signature"]["k.stride"] == "i32"
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
    prefix = f"support.wrong (wrong, 1 warps) on sm_90, Triton {compiled['results'][0]['triton']}: "
    assert any(p.startswith(f"{prefix}ValueError: ") and "shape" in p for p in compiled["problems"])


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
    assert inner.mix == {"LDG": 1}


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


def instruction(
    opcode: str,
    *,
    stall: int = 1,
    releases: int = 7,
    waits: tuple[int, ...] = (),
    operands: str = "",
) -> Instruction:
    mask = sum(1 << i for i in waits)
    return Instruction(opcode, False, None, operands, stall | releases << 5 | 7 << 8 | mask << 11)


def test_control_words() -> None:
    x = instruction("LDG.E.128", stall=6, releases=2, waits=(0, 5))
    assert (x.stall, x.releases, x.frees, x.waits) == (6, 2, None, [0, 5])
    nothing = x._replace(control=NO_CONTROL)
    assert (nothing.stall, nothing.releases, nothing.waits) == (1, None, [])


def test_critical_path() -> None:
    load = instruction("LDG.E.128", releases=0)
    dependent = instruction("LDG.E.128", releases=1, waits=(0,))
    use = instruction("FADD", waits=(1,))
    assert of_loop([load, dependent, use]) == Stalls(2 * LOAD + 1, 2 * LOAD - 2)
    beside = instruction("LDG.E.128", releases=1)
    once = of_loop([load, beside, instruction("FADD", waits=(0, 1))])
    assert once == Stalls(LOAD + 2, LOAD - 1)
    table = instruction("LDG.E", releases=0)
    assert of_loop([table, dependent, use]).cycles == TABLE + LOAD + 1
    assert of_loop([instruction("BAR.SYNC", stall=6)]) == Stalls(6 + BARRIER, 0)


@pytest.mark.parametrize("distance", [0, 1, 2])
def test_prefetches_hide_latency_by_their_distance(distance: int) -> None:
    body = [
        instruction("LDGSTS.E.128"),
        instruction("LDGDEPBAR", releases=0),
        instruction("DEPBAR.LE", operands=f"SB0, {distance:#x} "),
        *[instruction("FADD", stall=10)] * 20,
    ]
    found = of_loop(body)
    # Iterations of 203 cycles: the load of `distance` iterations ago is not done yet.
    assert found.cycles == pytest.approx(max(203, (LOAD + 203) / (distance + 1)), rel=0.1)
    assert found.exposed == pytest.approx(found.cycles - 203, abs=1)


def test_prefetching_is_read_from_a_cubin(by_case: dict[str, dict[str, Any]]) -> None:
    def loop(case: str) -> dict[str, Any]:
        (found,) = by_case[case]["code"]["loops"]
        return found

    plain, one, two = map(loop, ("not prefetched", "sound", "prefetched by two"))
    assert plain["mix"].get("LDGSTS", 0) == 0 and plain["mix"]["LDG"] > 0
    assert one["mix"]["LDGSTS"] == two["mix"]["LDGSTS"] > 0 and one["mix"].get("LDG", 0) == 0
    assert all(x["mix"]["BAR"] > 0 and x["mix"]["LDSM"] > 0 for x in (plain, one, two))
    # With two stages Triton starts the next copy as an iteration ends, and waits for it at once.
    assert all(0.9 * LOAD < x["stalls"]["exposed"] <= LOAD for x in (plain, one))
    assert two["stalls"]["exposed"] < LOAD / 2
    chain = loop("chain")
    loads = chain["mix"]["LDG"]  # the compiler unrolls the loop
    assert loads >= 2 and chain["tensor"] == 0
    exposed, cycles = chain["stalls"]["exposed"], chain["stalls"]["cycles"]
    assert 0.95 * loads * LOAD < exposed < cycles < 1.1 * loads * LOAD


def test_what_is_on_record_is_not_compiled(compiled: dict[str, Any]) -> None:
    first = compiled["results"][0]["fingerprint"]
    assert compiled["seen"] == [first] and compiled["again"] == ["no loop"]


@pytest.fixture(scope="module")
def record(compiled: dict[str, Any]) -> list[Built]:
    """Sound results."""
    return [r for r in from_json(compiled["results"]) if not r.problems]


def test_a_record_is_read_as_it_was_written(compiled: dict[str, Any]) -> None:
    results = from_json(compiled["results"])
    assert json.loads(json.dumps(as_json(results))) == compiled["results"]
    assert [r.cases for r in results if not r.fingerprint] == [["wrong"]]
    assert len({r.fingerprint for r in results}) == len(results)


def test_a_false_record_is_noticed(record: list[Built]) -> None:
    assert verdict(record, Compiled(record, [])) == []
    assert record[0].code is not None
    code = record[0].code
    for false in (
        record[0]._replace(shared=record[0].shared + 16),
        record[0]._replace(code=code._replace(registers=code.registers - 1)),
        record[0]._replace(code=code._replace(whole=code.whole._replace(instructions=1))),
    ):
        (line,) = differences([false, *record[1:]], record)
        assert line.startswith(record[0].name) and "the record" in line
        assert verdict([false, *record[1:]], Compiled(record, [])) == [line]


def test_what_is_not_on_record_must_be_sound(compiled: dict[str, Any], record: list[Built]) -> None:
    assert verdict(record[1:], Compiled(record[:1], [])) == []
    spilling = [r for r in from_json(compiled["results"]) if r.cases == ["spilling"]]
    (line,) = verdict(record, Compiled(spilling, []))
    assert "spills" in line


def test_a_spill_on_record_fails_where_it_is_shipped(
    compiled: dict[str, Any], record: list[Built]
) -> None:
    every = from_json(compiled["results"])
    (spilling,) = [r for r in every if r.cases == ["spilling"]]
    (line,) = verdict(every, Compiled([], [spilling.fingerprint]))
    assert "spills" in line
    assert verdict(every, Compiled([], [r.fingerprint for r in record])) == []


def test_rows_that_differ_in_their_cases_are_folded() -> None:
    rows = [["a", ["x", "y"], 1], ["b", ["z"], 1], ["a", ["y", "w"], 1]]
    assert folded(rows, 1) == [["a", "x + 2", 1], ["b", "z", 1]]


def test_samples() -> None:
    names = [str(i) for i in range(4000)]
    chosen = {name for name in names if sampled(name, "a")}
    assert chosen == {name for name in names if sampled(name, "a")}
    assert 50 < len(chosen) < 110
    assert len(chosen & {name for name in names if sampled(name, "b")}) < 20


TILE = Tile("K8V4", tokens=64, elements=2 * 64 * 128, bytes=64 * 200)
LOOP = Loop(
    0, 750, [], 8, 2 * 2 * 64 * 128 * 8 // 2, 64 * 200 // 2, Stalls(cycles=1000, exposed=0), {}
)


def test_bounds_on_a_gpu() -> None:
    found = predict(TILE, LOOP, num_warps=2, blocks=6)
    assert found.per_element == 750 * 2 * 32 / (2 * 64 * 128)
    assert found.loads == 1
    assert found.bytes == pytest.approx(200 / 4.3)  # 4.3 bytes per picosecond
    assert found.issue == pytest.approx(750 * 2 / 64 / (4 * 132 * 1.755e-3))
    assert found.tensor == pytest.approx(2 * 2 * 128 * 8 / (0.62 * 4096 * 132 * 1.755e-3))
    assert (found.limit, found.share) == ("bytes", 1.0)
    twice = predict(TILE._replace(iterations=2), LOOP, num_warps=2, blocks=6)
    assert (twice.bytes, twice.issue, twice.loads) == (found.bytes, 2 * found.issue, 2)
    assert twice.latency == pytest.approx(2 * found.latency)


def test_latency_limits_what_few_blocks_can_read() -> None:
    slow = LOOP._replace(stalls=Stalls(cycles=10_000, exposed=9000))
    shares = [predict(TILE, slow, num_warps=2, blocks=blocks).share for blocks in (2, 4, 6, 8)]
    assert shares == sorted(shares) and shares[-1] < 1
    assert predict(TILE, slow, num_warps=2, blocks=2).limit == "latency"
    # One warp to a scheduler, which waits for nobody.
    alone = predict(TILE, slow, num_warps=2, blocks=2)
    assert alone.tile == pytest.approx(10_000 / 1755)
    assert alone.latency == pytest.approx(alone.tile * 1e6 / (132 * 2 * 64))
    faster = slow._replace(stalls=Stalls(cycles=9000, exposed=8000))
    assert predict(TILE, faster, 2, 6).latency < predict(TILE, slow, 2, 6).latency
    longer = slow._replace(instructions=900)
    assert predict(TILE, longer, 2, 6).latency > predict(TILE, slow, 2, 6).latency


def test_the_loop_around_is_shared_out() -> None:
    around = LOOP._replace(instructions=1000, stalls=Stalls(cycles=5000, exposed=4000))
    tile = TILE._replace(per_turn=8)
    alone, paged = (predict(tile, LOOP, 2, 2, x) for x in (None, around))
    assert alone.paged == alone.latency == paged.latency
    assert paged.paged / paged.latency == pytest.approx((1000 + 4000 / 8) / 1000)
    assert predict(TILE, LOOP, 2, 2, around).paged == alone.latency


def test_warps_take_turns() -> None:
    assert turn_cycles(100, 1000, 1) == 1000
    assert turn_cycles(1000, 1000, 4) == pytest.approx(4000)  # nothing but issue
    times = [turn_cycles(100, 1000, n) for n in range(1, 30)]
    assert times == sorted(times)
    assert all(n * 100 <= time < 1000 + n * 100 for n, time in enumerate(times, 1))
