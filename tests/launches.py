"""How many launches a call takes on a GPU: Triton's, counted in the interpreter, and PyTorch's operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from unittest import mock

from torch.profiler import ProfilerActivity, profile, record_function
from triton.runtime.interpreter import InterpretedFunction

LAUNCH = "triton launch"
# Operators that move no data: they allocate, or look at a tensor in another way.
PASSIVE = {
    f"aten::{name}" for name in
    """empty empty_like empty_strided new_empty view view_as reshape _reshape_alias detach detach_ as_strided select
    slice unbind expand expand_as squeeze unsqueeze t transpose permute alias result_type set_ to contiguous split
    resolve_conj resolve_neg lift_fresh unsafe_split narrow flatten split_with_sizes _unsafe_view
    promote_types resize_""".split()
}  # fmt: skip


def launches(function: Callable[[], object]) -> Counter[str]:
    """Name -> how often it is launched. An operator made of others counts as those."""
    original = InterpretedFunction.run

    def run(self, *args, **kwargs):
        with record_function(f"{LAUNCH} {self.fn.__name__}"):
            return original(self, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", run), profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    counted: Counter[str] = Counter()

    def walk(event) -> bool:
        """Counts what an event launches; whether that was anything."""
        if event.name.startswith(LAUNCH):
            counted[event.name.removeprefix(LAUNCH).strip()] += 1
            return True
        inner = [walk(child) for child in event.cpu_children]
        if any(inner):
            return True
        active = event.name.startswith("aten::") and event.name not in PASSIVE
        counted[event.name] += active
        return active

    for event in found.events():
        if event.cpu_parent is None:
            walk(event)
    return +counted


def describe(counted: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counted.most_common())
