# SPDX-License-Identifier: Apache-2.0
"""How much of a kernel fits on one streaming multiprocessor."""

from __future__ import annotations

from typing import NamedTuple

REGISTERS = 65536
"""32-bit registers of a multiprocessor, of every architecture here."""

REGISTER_UNIT = 256
"""Registers are handed out to warps in this unit."""

WARP_UNIT = 4
"""A multiprocessor has four partitions, each with a quarter of the registers."""

SHARED_UNIT = 128
SHARED_RESERVED = 1024
"""Bytes of shared memory that the system takes per block."""

TENSOR_COLUMNS = 512
"""Columns of tensor memory, where there is one."""


class Limits(NamedTuple):
    """Of one multiprocessor, from CUDA's table of compute capabilities; shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_per_block: int


ARCHITECTURES: dict[str, Limits] = {
    "sm_80": Limits(64, 32, 164 << 10, 163 << 10),
    "sm_89": Limits(48, 24, 100 << 10, 99 << 10),
    "sm_90": Limits(64, 32, 228 << 10, 227 << 10),
    "sm_100": Limits(64, 32, 228 << 10, 227 << 10),
}


class Occupancy(NamedTuple):
    """Thread blocks and warps of one kernel on a multiprocessor, and what limits them."""

    blocks: int
    warps: int
    limit: str


def _round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def occupancy(
    limits: Limits, *, num_warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> Occupancy:
    """Of a kernel with ``registers`` per thread and ``shared`` bytes per block."""
    per_warp = _round_up(registers * 32, REGISTER_UNIT)
    warps_by_registers = REGISTERS // per_warp // WARP_UNIT * WARP_UNIT
    by = {
        "warps": limits.warps // num_warps,
        "blocks": limits.blocks,
        "registers": warps_by_registers // num_warps,
        "shared": limits.shared // _round_up(shared + SHARED_RESERVED, SHARED_UNIT),
    }
    if tensor_columns:
        by["tensor memory"] = TENSOR_COLUMNS // tensor_columns
    if limits.shared_per_block < shared:
        by["shared"] = 0
    limit = min(by, key=lambda name: by[name])
    return Occupancy(by[limit], by[limit] * num_warps, limit)
