"""Cards by name: memory, bandwidth, links and products of their makers' data sheets, and what was measured on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.checks import did_you_mean


@dataclass(frozen=True)
class Rates:
    """What a card sustains: flops, operations a second of the head's products; copy, bytes a second read and written.

    origin: "measured", "assumed" (another card's share of its data sheet), or "given" by who asks.
    """

    flops: float
    copy: float
    origin: str


@dataclass(frozen=True)
class Card:
    """memory: bytes; bandwidth: of memory, bytes a second; flops: dense bf16 (and fp16) products, operations a second;
    link: bytes a second, one way, to the other cards of a node. All by the data sheet but `measured`.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    measured: Rates | None = None

    @property
    def rates(self) -> Rates:
        """Measured, or assumed: the share of its data sheet that the measured card reaches."""
        if self.measured is not None:
            return self.measured
        known = CARDS[REFERENCE]
        assert known.measured is not None
        flops, copy = known.measured.flops / known.flops, known.measured.copy / known.bandwidth
        return Rates(self.flops * flops, self.bandwidth * copy, "assumed")


GIB = 1 << 30
REFERENCE = "h200"
# Memory is the data sheet's number in GiB, of which a driver keeps 1 or 2 % (an L40S with ECC 7 %); the H200's is what
# CUDA reports. Dense rates: half of what a sheet gives "with sparsity".
CARDS = {
    "a100": Card("NVIDIA A100 SXM 80 GB", 80 * GIB, 2.039e12, 312e12, 300e9),
    "a100-40gb": Card("NVIDIA A100 SXM 40 GB", 40 * GIB, 1.555e12, 312e12, 300e9),
    "h100": Card("NVIDIA H100 SXM 80 GB", 80 * GIB, 3.35e12, 989.4e12, 450e9),
    "h100-pcie": Card("NVIDIA H100 PCIe 80 GB", 80 * GIB, 2.0e12, 756e12, 64e9),
    "h100-nvl": Card("NVIDIA H100 NVL 94 GB", 94 * GIB, 3.9e12, 835e12, 64e9),
    "h20": Card("NVIDIA H20 96 GB", 96 * GIB, 4.0e12, 148e12, 450e9),
    "h200": Card(
        "NVIDIA H200 SXM 141 GB", 150_000_000_000, 4.8e12, 989.4e12, 450e9, Rates(705e12, 4.25e12, "measured")
    ),
    "b200": Card("NVIDIA B200 180 GB", 180 * GIB, 8.0e12, 2250e12, 900e9),
    "l40s": Card("NVIDIA L40S 48 GB", 48 * GIB, 0.864e12, 362e12, 32e9),
    "mi300x": Card("AMD Instinct MI300X 192 GB", 192 * GIB, 5.3e12, 1307.4e12, 448e9),
    "mi325x": Card("AMD Instinct MI325X 256 GB", 256 * GIB, 6.0e12, 1307.4e12, 448e9),
}


def find_card(name: object, argument: str = "gpu", others: Sequence[str] = ()) -> Card:
    """The card of a name, in any case; raises ValueError with all names (and `others`), and the nearest."""
    key = name.lower().replace(" ", "-").replace("_", "-") if isinstance(name, str) else ""
    if key in CARDS:
        return CARDS[key]
    names = ", ".join((*others, *CARDS))
    raise ValueError(f"{argument} must be one of {names}; got {name!r}{did_you_mean(key, CARDS)}")
