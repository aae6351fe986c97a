"""What linear_policy_loss holds at its peak, by part, from the sizes alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch

from ..backends.choice import BACKENDS
from ..backends.torch.rows import CPU_CHUNK, GPU_CHUNK
from ..core.checks import check_word, compute_dtype
from ..core.tiles import Tiles, card_chunk_bytes, column_tiles, default_chunk_bytes
from ..losses.linear import ROUTES
from ..named_objectives import as_objective
from ..objectives import Objective
from .cards import find_card
from .step import HeadStep, check_whole

# fp32 or integer numbers per token that the stages between the vocabulary's two hold at once.
_PER_TOKEN = 40
PARTS = ("logits_chunk", "scratch", "weight_gradient", "hidden_gradient", "compacted_hidden", "per_token")


class MemoryEstimate(dict[str, int]):
    """Bytes above the inputs: the most that each part holds at any time, and "total", the peak.

    moment: when the peak is, "statistics", "gradient" or "end of backward". peak: the bytes by part at that moment,
    whose sum is the total; a part may hold more at another one.
    """

    def __init__(
        self, parts: Mapping[str, int] | Iterable[tuple[str, int]] = (), peak: Mapping[str, int] | None = None,
        moment: str = "",
    ):  # fmt: skip
        super().__init__(parts)
        self.peak = dict(peak or {})
        self.moment = moment

    @classmethod
    def of(cls, moments: Iterable[tuple[str, dict[str, int]]]) -> MemoryEstimate:
        """From what is held at each moment; the first of equal peaks."""
        moments = list(moments)
        moment, peak = max(moments, key=lambda one: sum(one[1].values()))
        most = {name: max(held.get(name, 0) for _, held in moments) for name in PARTS}
        return cls({**most, "total": sum(peak.values())}, {name: peak.get(name, 0) for name in PARTS}, moment)

    def beside(self, **others: int) -> MemoryEstimate:
        """With parts that live all the time."""
        parts = {name: size for name, size in self.items() if name != "total"}
        total = self["total"] + sum(others.values())
        return MemoryEstimate({**parts, **others, "total": total}, {**self.peak, **others}, self.moment)


def _itemsize(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _scratch(tiles: Tiles, dtype: torch.dtype, device: torch.device, backend: str) -> int:
    """The torch backend's three buffers of a few rows; the Triton backend's partial statistics."""
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        return 3 * 4 * tiles.rows * -(-tiles.columns // 32768)
    step = min(max((CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // tiles.columns, 2), max(tiles.rows, 1))
    return 3 * (step + 1) * tiles.columns * _itemsize(compute_dtype(dtype))


def _operands(tiles: Tiles, width: int, dtype: torch.dtype, device: torch.device, wide: tuple[bool, bool]) -> int:
    """Copies in fp32 that a low-precision product takes to be summed in fp32 where no GEMM does that.

    wide: whether the products of the hidden states and of the weight are.
    """
    if device.type == "cuda" or dtype in (torch.float32, torch.float64):
        return 0
    tile = tiles.rows * tiles.columns
    return 4 * max(
        (tile + tiles.columns * width) * wide[0], (tile + tiles.rows * width) * wide[1]
    )  # fmt: skip


def _place(device: torch.device | str | None, device_memory: int | None) -> tuple[torch.device, int | None]:
    """Where it runs, and the bytes of a card that is not asked."""
    if device is None:
        device = "cpu" if device_memory is None else "cuda"
    if isinstance(device, str) and re.fullmatch(r"cpu|cuda(:\d+)?", device):
        device = torch.device(device)
    if not isinstance(device, torch.device) or device.type not in ("cpu", "cuda"):
        card = find_card(device, "device", ("cpu", "cuda"))
        if device_memory is not None:
            raise ValueError(f"device = {device!r} has a memory of its own; give device_memory = {device_memory} alone")
        return torch.device("cuda"), card.memory
    if device_memory is not None:
        check_whole("device_memory", device_memory, 1, "positive")
        if device.type == "cpu":
            raise ValueError(f"device_memory is the size of a GPU; got {device_memory} for device 'cpu'")
    return device, device_memory


def _default_bytes(device: torch.device, device_memory: int | None, one_pass: bool) -> int:
    if device_memory is not None:
        return card_chunk_bytes(device_memory, one_pass)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda' asks the GPU that is here, and none is: name a card, or give device_memory")
    return default_chunk_bytes(device, one_pass)


def estimate_memory(
    rows: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype = torch.bfloat16,
    objective: Objective | str | None = None,
    *,
    route: str = "auto",
    active_fraction: float = 1.0,
    statistics: str = "all",
    frozen_weight: bool = False,
    main_grad: bool = False,
    max_chunk_bytes: int | None = None,
    device: torch.device | str | None = None,
    device_memory: int | None = None,
    backend: str = "auto",
    rollouts: int = 16,
    on_policy: bool = False,
) -> MemoryEstimate:
    """Bytes that forward and backward of linear_policy_loss hold at their peak above the inputs, by part.

    Args:
        rows: tokens N; width: H; vocabulary: V; dtype: of the head, its weight and the hidden states.
        objective: an Objective, or a preset's name (None: dapo). It decides which route "auto" takes; by one route all
            hold the same, but that a chunk from which a rule drops tokens is copied without them, which is left out.
        route: "auto" takes what linear_policy_loss does, "one-pass" and "recompute" as there, "statistics" is a call
            under no_grad.
        active_fraction: share of the rows with a gradient, where compaction leaves the others out.
        statistics: "all" tokens, or "active": of the rows with a gradient alone.
        max_chunk_bytes: budget of the tile of logits; None: linear_policy_loss's default on the device.
        backend: "triton", "torch" or "auto".
        device: "cpu" (the default without device_memory), "cuda", which asks the GPU that is here for its memory, or
            the name of a card that need not be here, such as "h100" (planning.cards has them all).
        device_memory: bytes of a card that is not here, of no name. The default chunks are what such a card takes while
            most of it is free.
        frozen_weight: no gradient of the weight. main_grad: it is added to a buffer that is there already.
        rollouts, on_policy: S, of equal length, and whether no old log-probs are given: what "auto" needs to know of an
            objective that needs whole rollouts, or the batch.

    Returns:
        A dictionary with the most that each part ever holds: logits_chunk, scratch (buffers of the statistics and
        gradients, or on the CPU the fp32 operands of products in low precision), weight_gradient, hidden_gradient,
        compacted_hidden (copies of hidden states), per_token; and total: the largest sum that lives at one time. Its
        `peak` has the parts of that time, and `moment` its name.

    Raises:
        ValueError: an unknown word, preset or card, a size out of range, device_memory of a CPU or beside a card's
            name, "cuda" without a GPU, or route="one-pass" where no chunk holds what the objective needs.
        TypeError: an objective or a dtype that is none.
    """
    check_word("route", route, (*ROUTES, "statistics"))
    check_word("backend", backend, BACKENDS)
    device, device_memory = _place(device, device_memory)

    def chunk_bytes(one_pass: bool) -> int:
        return max_chunk_bytes or _default_bytes(device, device_memory, one_pass)

    # HeadStep checks the other arguments, and knows what "auto" is.
    step = HeadStep(
        rows, vocabulary, width, dtype, as_objective("dapo" if objective is None else objective),
        on_policy=on_policy, rollouts=rollouts, route="auto" if route == "statistics" else route,
        active_fraction=active_fraction, statistics=statistics, frozen_weight=frozen_weight,
        max_chunk_bytes=chunk_bytes(True) if max_chunk_bytes is None else max_chunk_bytes,
    )  # fmt: skip
    taken = "statistics" if route == "statistics" else step.taken_route
    return MemoryEstimate.of(_moments(step, taken, chunk_bytes, main_grad, device, backend))


def memory_of_step(step: HeadStep) -> MemoryEstimate:
    """As estimate_memory, of one rank of a step on its card: its part of the vocabulary and of the rows."""
    return MemoryEstimate.of(_moments(step, step.taken_route, step.chunk_bytes, False, torch.device("cuda"), "auto"))


def _moments(
    step: HeadStep, route: str, chunk_bytes: Callable[[bool], int], main_grad: bool, device: torch.device, backend: str
) -> list[tuple[str, dict[str, int]]]:
    """What is held when each stage holds most. chunk_bytes: the budget, by whether it is of one pass."""
    rows, width, vocabulary, dtype = step.tokens, step.width, step.shard, step.dtype
    item, wide = _itemsize(dtype), _itemsize(compute_dtype(dtype))
    active, computed, frozen_weight = step.active, step.computed, step.frozen_weight
    compact = active < rows

    one_pass = route == "one-pass"
    tiles = step.tile() if one_pass else column_tiles(active, vocabulary, item, chunk_bytes(False))
    # One chunk is formed while ranks exchange another's statistics.
    buffers = 2 if one_pass and step.tp > 1 and tiles.row_count > 1 else 1
    half = dtype == torch.float16
    # One product is rounded once, to its own dtype; a sum of several is wide.
    lone_weight = not half and tiles.row_count <= 1 and not main_grad if one_pass else tiles.row_count <= 1
    lone_hidden = not half and tiles.column_count <= 1 and device.type == "cpu"
    weight_item = wide if one_pass and not lone_weight else item
    hidden_item = item if lone_hidden else wide

    def tile_bytes(tiles: Tiles) -> int:
        return tiles.rows * tiles.columns * item

    def stage(tiles: Tiles, gradient: bool) -> dict[str, int]:
        scratch = _scratch(tiles, dtype, device, backend)
        if gradient:
            products = _operands(tiles, width, dtype, device, (not lone_hidden, not lone_weight and not frozen_weight))
            scratch = max(scratch, products)  # one is gone before the other comes
        return {"logits_chunk": tile_bytes(tiles) * (buffers if gradient else 1), "scratch": scratch}

    def gradients(slices: int) -> dict[str, int]:
        weight = 0 if frozen_weight or (main_grad and not one_pass) else vocabulary * width * weight_item
        return {
            "weight_gradient": weight + slices, "hidden_gradient": active * width * hidden_item,
            "compacted_hidden": active * width * item if compact else 0,
        }  # fmt: skip

    moments: list[tuple[str, dict[str, int]]] = []
    if computed and not (one_pass and active == computed):
        others = computed - active if one_pass else computed
        held = gradients(0) if one_pass and active else {}
        gathered = others * width * item if others < rows else 0
        here = stage(column_tiles(others, vocabulary, item, chunk_bytes(False)), False)
        # The one-pass buffer lives until the other rows' statistics are taken.
        here["logits_chunk"] += buffers * tile_bytes(tiles) if one_pass and active else 0
        here["compacted_hidden"] = held.get("compacted_hidden", 0) + gathered
        moments.append(("statistics", {**held, **here}))
    if active and route != "statistics":
        sliced = not one_pass and item < wide and not lone_weight and not frozen_weight
        here = {**gradients(tiles.columns * width * wide if sliced else 0), **stage(tiles, True)}
        # Where backward does not count the rows that have a gradient it clears the others' hidden states in a copy.
        here["compacted_hidden"] += active * width * item if not one_pass and device.type == "cuda" else 0
        moments.append(("gradient", here))
        # Backward's last moment: the gradients, and their copies in the parameters' dtype or among all rows.
        end = gradients(0)
        if one_pass:
            end["compacted_hidden"] = 0  # forward's
        else:
            end["logits_chunk"] = tile_bytes(tiles)
        if weight_item > item and not main_grad:
            end["weight_gradient"] += 0 if frozen_weight else vocabulary * width * item
        end["hidden_gradient"] += rows * width * item if compact else 0
        end["hidden_gradient"] += active * width * item if hidden_item > item else 0
        moments.append(("end of backward", end))
    return [(name, {**held, "per_token": _PER_TOKEN * 4 * rows}) for name, held in moments or [("statistics", {})]]
