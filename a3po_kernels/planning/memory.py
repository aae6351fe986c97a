"""What linear_policy_loss holds at its peak, by part, from the sizes alone."""

from __future__ import annotations

import torch

from ..backends.torch.rows import CPU_CHUNK, GPU_CHUNK
from ..core.checks import compute_dtype
from ..core.tiles import Tiles, card_chunk_bytes, column_tiles, default_chunk_bytes, row_tiles
from ..named_objectives import as_objective
from ..objectives import Objective

# fp32 or integer numbers per token that the stages between the vocabulary's two hold at once.
_PER_TOKEN = 40


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


def estimate_memory(
    rows: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype = torch.bfloat16,
    objective: Objective | str | None = None,
    *,
    route: str = "one-pass",
    active_fraction: float = 1.0,
    statistics: str = "all",
    frozen_weight: bool = False,
    main_grad: bool = False,
    max_chunk_bytes: int | None = None,
    device: torch.device | str = "cpu",
    device_memory: int | None = None,
    backend: str = "auto",
) -> dict[str, int]:
    """Bytes that forward and backward of linear_policy_loss hold at their peak above the inputs, by part.

    Args:
        rows: tokens N; width: H; vocabulary: V; dtype: of the head, its weight and the hidden states.
        objective: Lp-Reg's rows cost nothing more; any objective holds the same.
        route: "one-pass", "recompute", or "statistics" for a call under no_grad.
        active_fraction: share of the rows with a gradient, where compaction leaves the others out.
        statistics: "all" tokens, or "active": of the rows with a gradient alone.
        max_chunk_bytes: budget of the tile of logits; None: linear_policy_loss's default on the device.
        backend: "triton", "torch" or "auto". device: where it runs.
        device_memory: bytes of a card that is not here; with it and device="cuda" no GPU is asked, and the default
            chunks are what that card takes while most of it is free.
        frozen_weight: no gradient of the weight. main_grad: it is added to a buffer that is there already.

    Returns:
        logits_chunk, scratch (buffers of the statistics and gradients, or on the CPU the fp32 operands of products in
        low precision), weight_gradient, hidden_gradient, compacted_hidden, per_token, and total: the largest sum that
        lives at one time.

    Raises:
        ValueError: an unknown route, sizes out of range, or device_memory of a CPU.
    """
    if objective is not None:
        as_objective(objective)
    if route not in ("one-pass", "recompute", "statistics"):
        raise ValueError(f"route must be 'one-pass', 'recompute' or 'statistics'; got {route!r}")
    if min(rows, width, vocabulary) < 1 or not 0 <= active_fraction <= 1:
        raise ValueError("rows, width and vocabulary must be positive and active_fraction lie in [0, 1]")
    device = torch.device(device)
    if device_memory is not None and (device.type == "cpu" or device_memory < 1):
        raise ValueError(f"device_memory is the positive size of a GPU; got {device_memory} for device {device.type!r}")

    def default_bytes(one_pass: bool) -> int:
        if device_memory is not None:
            return card_chunk_bytes(device_memory, one_pass)
        return default_chunk_bytes(device, one_pass)

    budget, chunk_budget = (max_chunk_bytes or default_bytes(one_pass) for one_pass in (False, True))
    item, wide = _itemsize(dtype), _itemsize(compute_dtype(dtype))
    active = round(rows * active_fraction)
    computed = active if statistics == "active" else rows
    compact = active < rows
    per_token = _PER_TOKEN * 4 * rows

    one_pass = route == "one-pass"
    tiles = (
        row_tiles(active, vocabulary, item, chunk_budget)
        if one_pass
        else column_tiles(active, vocabulary, item, budget)
    )
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
        return {"logits_chunk": tile_bytes(tiles), "scratch": scratch}

    def gradients(slices: int) -> dict[str, int]:
        weight = 0 if frozen_weight or (main_grad and not one_pass) else vocabulary * width * weight_item
        return {
            "weight_gradient": weight + slices, "hidden_gradient": active * width * hidden_item,
            "compacted_hidden": active * width * item if compact else 0,
        }  # fmt: skip

    moments: list[dict[str, int]] = [{"per_token": per_token}]
    if computed and not (one_pass and active == computed):
        others = computed - active if one_pass else computed
        held = gradients(0) if one_pass and active else {}
        gathered = others * width * item if others < rows else 0
        here = stage(column_tiles(others, vocabulary, item, budget), False)
        # The one-pass buffer lives until the other rows' statistics are taken.
        here["logits_chunk"] += tile_bytes(tiles) if one_pass and active else 0
        here["compacted_hidden"] = held.get("compacted_hidden", 0) + gathered
        moments.append({**held, **here})
    if active and route != "statistics":
        sliced = not one_pass and item < wide and not lone_weight and not frozen_weight
        moments.append({**gradients(tiles.columns * width * wide if sliced else 0), **stage(tiles, True)})
        # Backward's last moment: the gradients, and their copies in the parameters' dtype or among all rows.
        end = gradients(0)
        if weight_item > item and not main_grad:
            end["weight_gradient"] += 0 if frozen_weight else vocabulary * width * item
        end["hidden_gradient"] += rows * width * item if compact else 0
        end["hidden_gradient"] += active * width * item if hidden_item > item else 0
        moments.append(end)
    for moment in moments:
        moment["per_token"] = per_token
    peak = max(moments, key=lambda moment: sum(moment.values()))
    names = ("logits_chunk", "scratch", "weight_gradient", "hidden_gradient", "compacted_hidden", "per_token")
    parts = {name: peak.get(name, 0) for name in names}
    return {**parts, "total": sum(parts.values())}
