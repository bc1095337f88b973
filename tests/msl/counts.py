"""What a launch moves and does, counted by the build for it: figures that need no clock.

A load of a SIMD-group is what its lanes load at one place of the program, each for the n-th time.
The compiler that decides how wide a load is, and whether one is left out, is clang at ``-O2``, not
Apple's; caches are not modelled. The same launch always gives the same figures.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """What a launch did to one buffer.

    Attributes:
        loads, stores: accesses by single lanes.
        read_bytes, write_bytes: their sizes added up.
        distinct_read, distinct_written: bytes of the buffer that were read, written, ever.
        group_loads: loads by SIMD-groups.
        group_bytes: distinct bytes of each of them, added up: what many lanes load is one.
        short_segments, long_segments: aligned pieces of 32 and 128 bytes that the loads of
            SIMD-groups touch, each counted anew for every load.
        short_ideal, long_ideal: the fewest pieces that hold as many distinct bytes.
        bank_turns: of threadgroup memory, where 32 banks of 4 bytes answer at once: what each load
            of a SIMD-group takes of them, 1 or more, added up. How many banks Apple's GPUs have
            is not documented; other makers' have 32.
        store_segments, store_ideal: as ``short_segments`` and ``short_ideal``, of stores.

    Threadgroup memory and constant tables have the first four; the former ``group_loads`` and
    ``bank_turns`` too.
    """

    loads: int = 0
    stores: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    distinct_read: int = 0
    distinct_written: int = 0
    group_loads: int = 0
    group_bytes: int = 0
    short_segments: int = 0
    short_ideal: int = 0
    long_segments: int = 0
    long_ideal: int = 0
    bank_turns: int = 0
    store_segments: int = 0
    store_ideal: int = 0

    @property
    def times_read(self) -> float:
        """How often lanes read each byte that is read at all: loads per byte."""
        return self.read_bytes / (self.distinct_read or 1)

    @property
    def times_written(self) -> float:
        """How often lanes write each byte that is written at all."""
        return self.write_bytes / (self.distinct_written or 1)

    @property
    def times_fetched(self) -> float:
        """``times_read`` by SIMD-groups: what many lanes read in one load counts once."""
        return self.group_bytes / (self.distinct_read or 1)

    @property
    def bank_conflicts(self) -> float:
        """Turns of the banks over loads of SIMD-groups; 1 is best."""
        return self.bank_turns / (self.group_loads or 1)

    @property
    def coalescing(self) -> float:
        """The fewest 32-byte pieces over those touched; 1 is best."""
        return self.short_ideal / (self.short_segments or 1)

    @property
    def coalescing_128(self) -> float:
        """``coalescing`` in pieces of 128 bytes."""
        return self.long_ideal / (self.long_segments or 1)


@dataclass(frozen=True)
class Counts:
    """What a launch did.

    Attributes:
        buffers: by name.
        threadgroup: accesses to threadgroup memory.
        tables: accesses to program-scope constant tables.
        threadgroup_bytes: threadgroup memory of a threadgroup.
        barriers: ``threadgroup_barrier``, once for each threadgroup that passes one.
        simdgroup_barriers: ``simdgroup_barrier``, once for each SIMD-group.
        simd_operations: SIMD functions and matrix products, once for each SIMD-group.
    """

    buffers: Mapping[str, Traffic]
    threadgroup: Traffic
    tables: Traffic
    threadgroup_bytes: int
    barriers: int
    simdgroup_barriers: int
    simd_operations: int

    @property
    def distinct_bytes(self) -> int:
        """The least the launch must move: bytes read and bytes written, each once."""
        return sum(t.distinct_read + t.distinct_written for t in self.buffers.values())


class CTraffic(ctypes.Structure):
    """The runtime's ``Traffic``."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in Traffic.__dataclass_fields__)

    def copy(self) -> Traffic:
        return Traffic(*(getattr(self, name) for name in Traffic.__dataclass_fields__))
