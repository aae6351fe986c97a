"""GPUs by their makers' data sheets: the two times that no kernel can beat, and the warps that a core can hold.

Arithmetic, not measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from a3po_kernels.planning.cards import CARDS

LIMIT_ROWS, LIMIT_VOCABULARY = 8192, 151936


@dataclass(frozen=True)
class Gpu:
    """`lanes`: thread-instructions that a core (SM, CU) issues in a clock; bandwidth in bytes a second."""

    name: str
    target: str
    cores: int
    lanes: int
    clock: float
    bandwidth: float

    def limits(self, instructions: float, dtype: str, passes: int) -> dict[str, float]:
        """Milliseconds for LIMIT_ROWS x LIMIT_VOCABULARY elements: to issue the instructions, and to move the bytes."""
        elements = LIMIT_ROWS * LIMIT_VOCABULARY
        size = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[dtype]
        return {
            "instructions": 1e3 * elements * instructions / (self.cores * self.lanes * self.clock),
            "bytes": 1e3 * elements * size * passes / self.bandwidth,
        }


# Boost clocks; an SM has four schedulers of 32 lanes, a CDNA 3 compute unit four SIMDs of 16.
GPUS = (
    Gpu("A100", "sm_80", 108, 128, 1.41e9, CARDS["a100"].bandwidth),
    Gpu("H100", "sm_90", 132, 128, 1.98e9, CARDS["h100"].bandwidth),
    Gpu("H200", "sm_90", 132, 128, 1.98e9, CARDS["h200"].bandwidth),
    Gpu("B200", "sm_100", 148, 128, 1.965e9, CARDS["b200"].bandwidth),
    Gpu("MI300X", "gfx942", 304, 64, 2.1e9, CARDS["mi300x"].bandwidth),
)


@dataclass(frozen=True)
class Core:
    """What an SM (a CDNA compute unit) holds: `registers` of 4 bytes a lane-wide file, shared memory in bytes.

    Registers are given to a warp `granularity` at a time, counted per thread; a program takes `reserved` bytes of
    shared memory beside its own. A CDNA unit has four register files, of which a warp sees one.
    """

    warp: int
    warps: int
    programs: int
    registers: int
    granularity: int
    shared: int
    reserved: int
    files: int = 1

    def resident_warps(self, registers: int, warps: int, shared: int) -> int:
        """Warps at once, of programs of so many warps with so many registers a thread and bytes of shared memory."""
        per_thread = -(-max(registers, 1) // self.granularity) * self.granularity
        by_registers = self.files * (self.registers // self.files // (per_thread * self.warp)) // warps
        by_shared = self.shared // (shared + self.reserved) if shared + self.reserved else self.programs
        return warps * min(by_registers, by_shared, self.warps // warps, self.programs)


# CUDA's occupancy tables; AMD's CDNA 3 ISA: 512 vector registers a lane of each SIMD, 8 wavefronts a SIMD.
CORES = {
    "sm_80": Core(32, 64, 32, 65536, 8, 164 * 1024, 1024),
    "sm_90": Core(32, 64, 32, 65536, 8, 228 * 1024, 1024),
    "sm_100": Core(32, 64, 32, 65536, 8, 228 * 1024, 1024),
    "gfx942": Core(64, 32, 32, 4 * 512 * 64, 8, 64 * 1024, 0, files=4),
}
