"""The demo's figures: training curves of one or several runs, and a heat-map of the tokens of a few rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import Normalize

SMOOTHED = 9  # steps of the running mean
ABSENT = math.nan


@dataclass(frozen=True)
class Panel:
    """Curves by the name of their values; of several runs that of `beside` alone, under its own title."""

    title: str
    curves: dict[str, str]
    beside: str = ""
    title_beside: str = ""
    exact: bool = False  # a schedule: no noise to smooth

    def names(self, runs: int) -> list[str]:
        return list(self.curves) if runs == 1 else [self.beside or next(iter(self.curves))]

    def heading(self, runs: int) -> str:
        return self.title if runs == 1 else self.title_beside or self.title


PANELS = (
    Panel("reward (train), accuracy (held out)", {"reward": "reward"}),
    Panel(
        "entropy, nats",
        {"entropy": "all", "entropy_positive": "advantage > 0", "entropy_negative": "advantage < 0"},
        title_beside="entropy, nats: all rollouts, those of advantage 0 too",
    ),
    Panel("response length, tokens", {"length": "length"}),
    Panel("weight of the selected tokens, β(step)", {"beta": "β"}, exact=True),
    Panel(
        "clipped tokens, share", {"clipped_low": "ratio too low", "clipped_high": "ratio too high"}, beside="clipped"
    ),
    Panel(
        "share with a gradient, and without advantage",
        {"active": "tokens with a gradient", "no_advantage": "rollouts of advantage 0"},
        title_beside="tokens with a gradient, share",
    ),
)


@dataclass
class Run:
    """What is drawn of a run: a row of values for each step, and examples.rollouts.evaluate around the training."""

    name: str
    history: list[dict]
    before: dict
    after: dict

    def values(self, name: str) -> list[float]:
        """NaN where a step has none, as a reward where rollouts are used again."""
        return [ABSENT if row.get(name) is None else float(row[name]) for row in self.history]

    def shows(self, name: str) -> bool:
        """Whether there is anything to see: a number that is not 0."""
        return any(value and not math.isnan(value) for value in self.values(name))


@dataclass
class Rollout:
    """One response, token by token; the objective dropped the tokens of weight 0, and weighs those not 1 otherwise."""

    prompt: str
    tokens: list[str]
    probability: list[float]
    entropy: list[float]
    weight: list[float]
    reward: float


def panels_of(runs: list[Run]) -> list[Panel]:
    """The panels that have something to show: a curve of some run that is neither missing nor 0 throughout."""
    return [p for p in PANELS if any(run.shows(name) for run in runs for name in p.names(len(runs)))]


def smooth(values: list[float], window: int = SMOOTHED) -> list[float]:
    """Centred running mean over the values that are there."""
    result = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if not math.isnan(v)]
        result.append(sum(near) / len(near) if near else ABSENT)
    return result


def label_of(name: str, text: str, run: Run) -> str:
    """A curve's label; that of the entropy of all rollouts says that those of advantage 0 are among them: how many."""
    shares = [share for share in run.values("no_advantage") if not math.isnan(share)]
    if name != "entropy" or not shares:
        return text
    first, last = (sum(part) / len(part) for part in (shares[:10], shares[-10:]))
    return f"{text}, with those of advantage 0:\n{first:.0%} of rollouts at first, {last:.0%} at last"


def _draw(axis, panel: Panel, name: str, run: Run, colour: str, label: str) -> None:
    steps, values = [row["step"] for row in run.history], run.values(name)
    there = [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]
    if panel.exact:
        axis.plot(*zip(*there, strict=True), color=colour, label=label)
        return
    axis.plot(*zip(*there, strict=True), color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smooth(values), color=colour, label=label)


def draw_curves(runs: list[Run], title: str, path: Path) -> list[Panel]:
    """The panels that have something to show, which it gives back: of one run in full, of several one curve each."""
    panels = panels_of(runs)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.3 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for axis in axes.flatten()[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flatten(), panels, strict=False):
        alone = len(runs) == 1
        drawn = [(name, run) for run in runs for name in panel.names(len(runs)) if run.shows(name)]
        for index, (name, run) in enumerate(drawn):
            colour = f"C{index}" if alone else f"C{runs.index(run) % 10}"
            label = label_of(name, panel.curves[name], run) if alone else run.name
            _draw(axis, panel, name, run, colour, label)
        if panel is PANELS[0]:
            for index, run in enumerate(runs):
                ends = [run.history[0]["step"] - 1, run.history[-1]["step"]]
                errors = [2 * result["standard_error"] for result in (run.before, run.after)]
                accuracies = [run.before["accuracy"], run.after["accuracy"]]
                style = {"fmt": "o", "color": "k" if alone else f"C{index % 10}", "capsize": 3}
                label = "held out ± 2 s.e." if alone else None
                axis.errorbar(ends, accuracies, yerr=errors, label=label, **style)
        axis.set_title(panel.heading(len(runs)), fontsize=10)
        axis.set_xlabel("training step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(drawn) > 1 or panel is PANELS[0]:
            axis.legend(fontsize=8)
    figure.suptitle(f"{title}; pale: each step, line: mean of {SMOOTHED} steps", fontsize=11)
    _save(figure, path)
    return panels


def _save(figure, path: Path) -> None:
    """A PNG of 256 colours, less than half the size."""
    from PIL import Image

    figure.savefig(path, dpi=90)
    plt.close(figure)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def text_colour(colour: tuple[float, ...]) -> str:
    """Black or white, whichever stands out more on an RGB colour: WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "k" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "w"


@dataclass
class _Scale:
    """Colours of one of the two rows of a rollout, dark where the model was unsure."""

    label: str
    colours: str
    top: float
    map: matplotlib.cm.ScalarMappable = field(init=False)

    def __post_init__(self):
        self.map = matplotlib.cm.ScalarMappable(Normalize(0.0, self.top), self.colours)


def _draw_cell(axis, x: int, y: int, scale: _Scale, value: float, text: str, dropped: bool) -> None:
    colour = scale.map.to_rgba(value)
    if dropped:
        colour = (0.93, 0.93, 0.93, 1.0)
    axis.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="w", linewidth=0.5))
    axis.text(
        x + 0.5, y + 0.5, text, ha="center", va="center", family="monospace", color=text_colour(colour),
        fontsize=12 if len(text) == 1 else 8,
    )  # fmt: skip


def draw_tokens(rollouts: list[Rollout], title: str, path: Path) -> None:
    """Each rollout as two rows of cells: its tokens on their probability, and their weights on their entropy.

    Tokens whose weight is not 1 are framed, those of weight 0 grey. The colour bars are below, each under its name.
    """
    width = max(len(rollout.tokens) for rollout in rollouts)
    scales = (
        _Scale("probability of the token (upper row)", "OrRd_r", 1.0),
        _Scale("entropy, nats (lower row); the number is the weight", "Purples", max(max(r.entropy) for r in rollouts)),
    )
    count = len(rollouts)
    figure = plt.figure(figsize=(0.34 * width + 0.8, 0.98 * count + 1.1), layout="constrained")
    grid = figure.add_gridspec(count + 1, 2, height_ratios=[1.0] * count + [0.16])
    for row, rollout in enumerate(rollouts):
        axis = figure.add_subplot(grid[row, :])
        for x, (token, weight) in enumerate(zip(rollout.tokens, rollout.weight, strict=True)):
            dropped, weighed = weight == 0.0, weight not in (0.0, 1.0)
            text = "end" if token == "<eos>" else token
            _draw_cell(axis, x, 0, scales[0], rollout.probability[x], text, dropped)
            _draw_cell(axis, x, 1, scales[1], rollout.entropy[x], f"×{weight:.3g}" if weighed else "", dropped)
            if weighed:
                axis.add_patch(plt.Rectangle((x + 0.05, 0.05), 0.9, 1.9, fill=False, linewidth=2.2, zorder=3))
        verdict = "right" if rollout.reward > 0 else "wrong"
        axis.set(xlim=(0, width), ylim=(2, 0), xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_title(f"{rollout.prompt}  {verdict}", fontsize=10, loc="left", family="monospace", pad=3)
    for column, scale in enumerate(scales):
        bar = figure.add_subplot(grid[count, column])
        figure.colorbar(scale.map, cax=bar, orientation="horizontal").ax.tick_params(labelsize=8)
        bar.set_title(scale.label, fontsize=9, pad=4)
    figure.suptitle(f"{title}; framed: weight not 1; grey: dropped", fontsize=11)
    _save(figure, path)
