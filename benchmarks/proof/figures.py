"""The figures of the report."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from examples.demo.figures import STYLE

from .arms import ArmSpec
from .claims import DETAIL

if TYPE_CHECKING:
    from .results import Results

DENSITY_ARMS = ("no compression", "pooled 1/4", "pooled 1/9", "pooled 1/16", "pooled 1/4 + VR")
LABELLED_PRUNERS = ("FastV 1/4", "VisionZip 1/4", "SparseVLM")
FORGETTING_ARMS = ("pooled 1/4", "pooled 1/4 + VR")
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
            axes.errorbar(x, y.value, yerr=None, fmt="o", color=colour, markersize=6 if shown else 4)
            if shown:
                place = HIGHLIGHTED[name]
                axes.annotate(name, (x, y.value), xytext=place, textcoords="offset points", fontsize=8)
        lines, tasks = results.by_arm["no compression"], results.tasks(DETAIL)
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


def density_figure(results: Results) -> Figure:
    """Attention density of vision tokens by decoder layer (eq. 1)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for name in DENSITY_ARMS:
            curves = [line["inside"]["density"] for line in results.by_arm[name]]
            if curves:
                mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                axes.plot(range(len(mean)), mean, marker="o", markersize=3, label=name)
        axes.axhline(1, color="#9aa5b1", linewidth=0.8, linestyle=":")
        axes.set(xlabel="decoder layer", ylabel="attention density", title="Who looks at vision tokens, layer by layer")
        axes.legend()
        return figure


def forgetting_figure(results: Results) -> Figure:
    """What a linear probe reads off the vision tokens in front of each layer."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for name in FORGETTING_ARMS:
            found = [line["inside"]["forgetting"] for line in results.by_arm[name] if "forgetting" in line["inside"]]
            for key, style in (("remembered", "-"), ("plain", "--")):
                curves = [one[key] for one in found if key in one]
                if curves:
                    mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                    label = f"{name}, blocks {'on' if key == 'remembered' else 'off'}"
                    axes.plot(range(len(mean)), mean, style, marker="o", markersize=3, label=label)
            if found:
                axes.axhline(found[0]["commonest"], color="#9aa5b1", linewidth=0.8, linestyle=":")
        axes.set(xlabel="in front of decoder layer", ylabel="probe accuracy",
                 title="What vision tokens still know of their first cell")  # fmt: skip
        axes.legend()
        return figure
