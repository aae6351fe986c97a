"""GPUs by their makers' data sheets, and the two times that no kernel can beat on them. Arithmetic, not measurement."""

from __future__ import annotations

from dataclasses import dataclass

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
    Gpu("A100", "sm_80", 108, 128, 1.41e9, 2.039e12),
    Gpu("H100", "sm_90", 132, 128, 1.98e9, 3.35e12),
    Gpu("H200", "sm_90", 132, 128, 1.98e9, 4.8e12),
    Gpu("B200", "sm_100", 148, 128, 1.965e9, 8.0e12),
    Gpu("MI300X", "gfx942", 304, 64, 2.1e9, 5.3e12),
)
