"""The demo's figures: training curves, and a heat-map of the tokens of a few rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Rollout:
    """One response, token by token; the objective dropped the tokens of weight 0, and weighs those not 1 otherwise."""

    prompt: str
    tokens: list[str]
    probability: list[float]
    entropy: list[float]
    weight: list[float]
    reward: float


def _smooth(values: list[float], window: int = 9) -> list[float]:
    """Centred running mean over the values that are there."""
    result = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if not math.isnan(v)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def draw_curves(history: list[dict], before: dict, after: dict, name: str, path: Path) -> None:
    """Reward, entropy (all, positive, negative rollouts), length, the selected tokens' weight, and clip fractions.

    history: the trainer's log rows; before and after: examples.rollouts.evaluate around the training.
    """
    panels = {
        "reward (train), accuracy (held out)": {"reward": "reward"},
        "entropy, nats": {
            "entropy": "all rollouts", "entropy/positive": "positive rollouts", "entropy/negative": "negative rollouts",
        },
        "response length, tokens": {"completions/mean_length": "length"},
        "weight of the selected tokens, β(step)": {"weight_beta": "β"},
        "clipped tokens, share": {"clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high"},
        "tokens with a gradient, share": {"active_fraction": "active"},
    }  # fmt: skip
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    axes = axes.flatten()
    steps = [row["step"] for row in history]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for index, (key, label) in enumerate(curves.items()):
            values = [math.nan if row.get(key) is None else float(row[key]) for row in history]
            axis.plot(steps, values, color=f"C{index}", alpha=0.25, linewidth=0.8)
            axis.plot(steps, _smooth(values), color=f"C{index}", label=label)
        axis.set(title=title, xlabel="training step")
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize=8)
    ends = [steps[0] - 1, steps[-1]]
    errors = [2 * result["standard_error"] for result in (before, after)]
    accuracies = [before["accuracy"], after["accuracy"]]
    axes[0].errorbar(ends, accuracies, yerr=errors, fmt="ko", capsize=3, label="held out ± 2 s.e.")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{name}: chain_sum, {len(history)} steps")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_tokens(rollouts: list[Rollout], name: str, path: Path) -> None:
    """Each rollout as two rows of coloured tokens, probability and entropy; weighed ones framed, dropped ones pale."""
    width = max(len(rollout.tokens) for rollout in rollouts)
    highest = max(max(rollout.entropy) for rollout in rollouts)
    figure, axes = plt.subplots(
        len(rollouts), 1, figsize=(0.42 * width + 3.2, 1.25 * len(rollouts) + 0.9), layout="constrained", squeeze=False
    )
    scales = []
    for axis, rollout in zip(axes[:, 0], rollouts, strict=True):
        rows = (("probability", rollout.probability, "RdYlGn", 1.0), ("entropy", rollout.entropy, "Purples", highest))
        for y, (_, values, colours, top) in enumerate(rows):
            grid = [[*values, *[math.nan] * (width - len(values))]]
            image = axis.imshow(grid, cmap=colours, vmin=0.0, vmax=top, extent=(0, width, y + 1, y), aspect="auto")
            scales.append(image)
        for x, (token, weight) in enumerate(zip(rollout.tokens, rollout.weight, strict=True)):
            text = "end" if token == "<eos>" else token
            size = 8 if len(text) > 1 else 11
            axis.text(x + 0.5, 0.5, text, ha="center", va="center", fontsize=size, family="monospace")
            if weight == 0.0:
                axis.add_patch(plt.Rectangle((x, 0), 1, 2, facecolor="w", alpha=0.75, linewidth=0))
            elif weight != 1.0:
                axis.add_patch(plt.Rectangle((x + 0.04, 0.04), 0.92, 1.92, fill=False, linewidth=2.0))
                dark = rollout.entropy[x] > highest / 2
                axis.text(
                    x + 0.5, 1.5, f"×{weight:.3g}", ha="center", va="center", fontsize=7, color="w" if dark else "k"
                )  # fmt: skip
        verdict = "right" if rollout.reward > 0 else "wrong"
        axis.set(xlim=(0, width), ylim=(2, 0), xticks=[], yticks=[0.5, 1.5])
        axis.set_yticklabels(["probability", "entropy"], fontsize=7)
        axis.set_title(f"{rollout.prompt}   ({verdict})", fontsize=9, loc="left", family="monospace")
    figure.colorbar(scales[0], ax=axes, fraction=0.012, pad=0.005).set_label("probability", fontsize=8)
    figure.colorbar(scales[1], ax=axes, fraction=0.012, pad=0.005).set_label("entropy, nats", fontsize=8)
    figure.suptitle(f"{name}: tokens before training; framed: weight not 1; pale: dropped", fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)
