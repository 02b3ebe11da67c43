"""The figures of the report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from examples.demo.figures import STYLE

from .arms import ArmSpec
from .claims import DETAIL
from .suites import RATIOS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .results import Results

DENSITY_PANELS = {
    "without blocks": ("no compression", *(f"pooled 1/{ratio}" for ratio in RATIOS)),
    "with blocks": tuple(f"pooled 1/{ratio} + VR" for ratio in RATIOS),
}
CURVE_ARMS = ("no compression", "1/4: saliency that takes nothing away", "pooled 1/4 + VR", "pooled 1/4")
LABELLED_PRUNERS = ("FastV 1/4", "VisionZip 1/4", "SparseVLM")
HIGHLIGHTED = {
    "no compression": (5, 4),
    "pooled 1/4": (-6, 8),
    "pooled 1/4 + VR": (6, -12),
    "pooled 1/9": (5, 4),
    "1/4: saliency that takes nothing away": (-20, 10),
}
"""Arms with a name in the plot, and where it stands."""


def pareto_figure(results: Results) -> Figure:
    """Accuracy on OCR & Chart against the time of a whole forward pass: arms, and pruners of the uncompressed one."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        specs: dict[str, list[ArmSpec]] = {}
        for arm in (arm for arms in results.suites.values() for arm in arms):
            specs.setdefault(arm.name, []).append(arm)
        for name, lines in results.by_arm.items():
            if not lines or not results.tasks(DETAIL):
                continue
            x = results.time(name, "forward")
            if x is None:
                continue
            y, shown = results.mean(name, DETAIL), name in HIGHLIGHTED
            remembers = any(spec.layers and not spec.control for spec in specs[name])
            colour = "#0b7a75" if remembers else "#9aa5b1"
            axes.errorbar(x, y.value, yerr=y.half, fmt="o", color=colour, markersize=6 if shown else 4)
            if shown:
                place = HIGHLIGHTED[name]
                axes.annotate(name, (x, y.value), xytext=place, textcoords="offset points", fontsize=8)
        lines, tasks = results.pruned(), results.tasks(DETAIL)
        for name in list(lines[0]["pruned"])[1:] if lines and tasks else ():
            found = [line["pruned"][name] for line in lines]
            x = results.time(name, "forward")
            if x is None:
                continue
            y = 100 * statistics.fmean(one["test"][task] for one in found for task in tasks)
            axes.plot(x, y, "x", color="#c2410c", markersize=5)
            if name in LABELLED_PRUNERS:
                axes.annotate(name, (x, y), xytext=(5, -8), textcoords="offset points", fontsize=7, color="#c2410c")
        for marker, colour, label in (
            ("o", "#0b7a75", "with blocks between the layers"),
            ("o", "#9aa5b1", "without"),
            ("x", "#c2410c", "no compression, pruned without training"),
        ):
            axes.plot([], [], marker, color=colour, label=label)
        axes.legend(loc="lower right")
        axes.set(xlabel="time of a forward pass, to average pooling at 1/4", ylabel=f"{DETAIL}, test accuracy in %",
                 title="What accuracy costs")  # fmt: skip
        return figure


def curves_figure(results: Results) -> Figure:
    """Validation accuracy while arms train, mean over seeds and all that they span."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for name in CURVE_ARMS:
            curves, tasks = [line["curve"] for line in results.by_arm[name]], results.tasks(DETAIL)
            if curves and tasks:
                steps = curves[0]["steps"]
                runs = [[100 * statistics.fmean(at[t] for t in tasks) for at in one["validation"]] for one in curves]
                points = list(zip(*runs, strict=True))
                means = [statistics.fmean(at) for at in points]
                (drawn,) = axes.plot(steps, means, marker="o", markersize=3, label=name)
                lowest, highest = [min(at) for at in points], [max(at) for at in points]
                axes.fill_between(steps, lowest, highest, color=drawn.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel="step", ylabel=f"{DETAIL}, validation accuracy in %", title="How soon it is learned")
        _legend(axes)
        return figure


def density_figure(results: Results) -> Figure:
    """Attention density of vision tokens by decoder layer (eq. 1), at each ratio."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        panels = figure.subplots(1, len(DENSITY_PANELS), sharey=True)
        for axes, (title, names) in zip(panels, DENSITY_PANELS.items(), strict=True):
            for name in names:
                _by_layer(axes, [line["inside"]["density"] for line in results.by_arm[name]], name)
            axes.axhline(1, color="#9aa5b1", linewidth=0.8, linestyle=":")
            axes.set(xlabel="decoder layer", title=f"Who looks at vision tokens, {title}")
            _legend(axes)
        panels[0].set_ylabel("attention density")
        return figure


def forgetting_figure(results: Results) -> Figure:
    """What a linear probe reads off the vision tokens in front of each layer, at each ratio that was run."""
    ratios = [ratio for ratio in RATIOS if results.by_arm[f"pooled 1/{ratio}"]] or RATIOS[:1]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * max(2, len(ratios)), 3.6), layout="constrained")
        panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
        for axes, ratio in zip(panels, ratios, strict=True):
            _forgetting(axes, results, ratio)
        panels[0].set_ylabel("probe accuracy: the first cell")
        _legend(panels[0])
        return figure


def _forgetting(axes: Axes, results: Results, ratio: int) -> None:
    pooled, ours = f"pooled 1/{ratio}", f"pooled 1/{ratio} + VR"
    for name, key, style, label in (
        (pooled, "plain", ":", "pooled"),
        (ours, "plain", "--", "with blocks, switched off"),
        (ours, "remembered", "-", "with blocks"),
    ):
        _by_layer(axes, [line["inside"]["forgetting"][key] for line in results.by_arm[name]], label, style)
    for line in results.by_arm[pooled][:1]:
        commonest = line["inside"]["forgetting"]["commonest"]
        axes.axhline(commonest, color="#9aa5b1", linewidth=0.8, label="the commonest label")
    axes.set(xlabel="in front of decoder layer", title=f"What tokens know, 1/{ratio}")


def _by_layer(axes: Axes, curves: Sequence[Sequence[float]], label: str, style: str = "-") -> None:
    """The mean over runs, layer by layer; nothing without runs."""
    if curves:
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        axes.plot(range(len(mean)), mean, style, marker="o", markersize=3, label=label)


def _legend(axes: Axes) -> None:
    """A legend, where anything was drawn."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
