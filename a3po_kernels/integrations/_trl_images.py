"""The images of TRL's batches: whose first dimension runs over rollouts, images, tiles or patches, cut by rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

COUNTS = ("num_images", "num_tiles")  # of each rollout, for the cuts; no argument of a model
OF_IMAGES = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "image_position_ids"
)  # fmt: skip
KEYS = (*OF_IMAGES, "token_type_ids", "mm_token_type_ids", *COUNTS)


def images_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of TRL's inputs is about images."""
    return {name: inputs[name] for name in KEYS if inputs.get(name) is not None}


def _between(counts: Sequence[int] | None, rows: slice) -> slice:
    """Which items are those of the rollouts `rows`, of which there are so many each."""
    if counts is None:
        return slice(0, 0)
    ends = [0, *accumulate(counts)]
    return slice(ends[rows.start], ends[rows.stop])


def some_rollouts(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """A batch's entries of rollouts start to stop, one a rollout but for its images, which are cut as TRL cuts them.

    Without the counts of images and tiles, which no model takes, and without images where these rollouts have none: a
    vision tower has no use for an empty batch. Nothing is waited for where start to stop is the whole batch.
    """
    rows = slice(start, stop)
    found = {name: values for name, values in batch.items() if name not in COUNTS}
    if (start, stop) != (0, len(batch["input_ids"])):
        found = {name: values[_places(name, batch, rows)] for name, values in found.items()}
    if "pixel_values" in found and not len(found["pixel_values"]):
        return {name: values for name, values in found.items() if name not in OF_IMAGES}
    return found


def _places(name: str, batch: Mapping[str, Any], rows: slice) -> slice:
    """Which of an entry's values are those of the rollouts `rows`."""
    of_images = _between(batch.get("num_images"), rows)
    if name not in OF_IMAGES:
        return rows
    if name in ("image_grid_thw", "image_sizes", "image_position_ids"):
        return of_images
    if name == "spatial_shapes" or "spatial_shapes" in batch:
        return _between(batch["num_tiles"], rows)
    if name == "pixel_attention_mask":
        return rows
    if "image_grid_thw" in batch:
        patches = batch["image_grid_thw"].prod(-1).tolist()
        before = sum(patches[: of_images.start])
        return slice(before, before + sum(patches[of_images]))
    if "num_tiles" in batch:
        return _between(batch["num_tiles"], rows)
    one_each = "num_images" in batch and len(batch[name]) == sum(batch["num_images"])
    return of_images if one_each or "image_position_ids" in batch else rows
