"""What a call multiplies and allocates, read from PyTorch's profiler; it sees inside custom operators."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def gemm_flops(function: Callable[[], object]) -> int:
    """2 m n k summed over every matrix product."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        function()
    total = 0
    for event in found.events():
        if event.name in ("aten::mm", "aten::addmm"):
            first = 0 if event.name == "aten::mm" else 1
            (m, k), (_, n) = event.input_shapes[first : first + 2]
            total += 2 * m * n * k
        assert event.name not in ("aten::bmm", "aten::baddbmm", "aten::linear"), "a product this does not count"
    return total


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that the CPU allocator held at once above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = function()
    del kept
    held = peak = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
