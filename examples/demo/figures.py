"""The report's figures."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vision_remember.adapters.report_page import INK
from vision_remember.adapters.report_page import STYLE as REPORT_STYLE

from .looks import Look
from .pages import BAR_HEIGHTS, BARS, GRID, LETTERS, PATCH, SHAPES, SIZE, TEXT_COLUMNS, TEXT_ROWS, Pages
from .questions import HEIGHTS, KINDS, VOCABULARY, answers

WRONG = "#c62828"
COLOURS = {
    "uncompressed": "#52606d",
    "pooled": "#d9822b",
    "pooled + MLP": "#8e5bb5",
    "pooled + VR": "#0b7a75",
    "pooled + VR, no saliency": "#6cc5b8",
}
CHARACTERS, BAR_KIND = KINDS[0], KINDS[1]
SHOWN_LAYER, SHOWN_TOKEN = 1, (1, 2)
STYLE: dict[str, Any] = {**REPORT_STYLE, "axes.titlesize": 10, "axes.titleweight": "bold"}


def accuracy_figure(results: dict[str, Any]) -> Figure:
    """Bars of accuracy by kind of question and arm, a dot per seed, with chance and the bag ceiling."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    axes = figure.subplots()
    arms = results["arms"]
    width = 0.8 / len(arms)
    for index, (name, arm) in enumerate(arms.items()):
        places = np.arange(len(KINDS)) + (index - (len(arms) - 1) / 2) * width
        values = 100 * np.array([[seed["accuracy"][kind.name] for kind in KINDS] for seed in arm["seeds"]])
        axes.bar(places, values.mean(0), width * 0.92, color=COLOURS[name], label=name)
        for row in values:
            axes.plot(places, row, ".", color=INK, markersize=3)
    for place, kind in enumerate(KINDS):
        axes.hlines(100 * kind.chance, place - 0.42, place + 0.42, color=WRONG, linestyles=":", linewidth=1.2)
    axes.plot([], [], ":", color=WRONG, label="chance")
    axes.hlines(100 * results["bag_ceiling"], -0.42, 0.42, color=INK, linestyles="--", lw=1.2, label="bag of four")
    axes.set(ylim=(0, 104), ylabel="test accuracy, %", title="Accuracy by kind of question")
    axes.set_xticks(range(len(KINDS)), [kind.name for kind in KINDS])
    figure.legend(loc="outside right upper")
    return figure


def curves_figure(results: dict[str, Any]) -> Figure:
    """Training loss, and validation accuracy on characters and bars, mean over the seeds."""
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    loss_axes, *accuracy_axes = figure.subplots(1, 3)
    for name, arm in results["arms"].items():
        curves = [seed["curve"] for seed in arm["seeds"]]
        losses = np.mean([curve["losses"] for curve in curves], axis=0)
        dashes = "--" if name == "pooled + MLP" else "-"  # it covers the pooled arm's curve
        loss_axes.plot(_smooth(losses), dashes, color=COLOURS[name], label=name)
        for axes, kind in zip(accuracy_axes, (CHARACTERS, BAR_KIND), strict=True):
            values = np.mean([[point[kind.name] for point in curve["accuracies"]] for curve in curves], axis=0)
            axes.plot(curves[0]["steps"], 100 * values, "." + dashes, color=COLOURS[name])
    loss_axes.set(title="Training loss", xlabel="step")
    for axes, kind in zip(accuracy_axes, (CHARACTERS, BAR_KIND), strict=True):
        axes.axhline(100 * kind.chance, color=WRONG, linestyle=":", linewidth=1)
        axes.set(title=f"{kind.name.capitalize()}, validation, %", xlabel="step", ylim=(0, 104))
    accuracy_axes[0].axhline(100 * results["bag_ceiling"], color=INK, linestyle="--", linewidth=1)
    figure.legend(loc="outside lower center", ncols=len(results["arms"]))
    return figure


def reading_figure(page: Pages, readings: dict[str, list[str]]) -> Figure:
    """The page and, cell for cell, what each arm reads; wrong answers in red."""
    truth = [VOCABULARY[token] for token in answers(page)[0].tolist()]
    panels = {"truth": truth, **readings}
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    axes = figure.subplots(2, -(-(len(panels) + 1) // 2)).flatten()
    for unused in axes[len(panels) + 1 :]:
        unused.set_axis_off()
    _show_page(axes[0], page)
    axes[0].set_title("the page")
    for panel, (name, words) in zip(axes[1:], panels.items(), strict=False):
        _draw_reading(panel, words, truth)
        letters = sum(a == b for a, b in zip(words[: len(CHARACTERS.columns)], truth, strict=False))
        panel.set_title(name if name == "truth" else f"{name}: {letters} of {len(CHARACTERS.columns)}")
    return figure


def look_figure(page: Pages, look: Look) -> Figure:
    """The saliency map over the page, and one token's attention into its region, head by head."""
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.1))  # type: ignore[misc]
    axes = left.subplots()
    _show_page(axes, page)
    image = axes.imshow(
        look.saliency.numpy(), extent=(0, SIZE, SIZE, 0), cmap="magma", alpha=0.6, interpolation="nearest", zorder=2
    )
    left.colorbar(image, ax=axes, shrink=0.75, location="bottom", label="saliency")
    row, column = SHOWN_TOKEN
    cells = GRID // look.token_grid[0]
    side = cells * PATCH
    box = Rectangle((column * side, row * side), side, side, fill=False, edgecolor="white", linewidth=2, zorder=3)
    axes.add_patch(box)
    axes.set_title("Saliency; the box is one token")

    weights = look.attention[SHOWN_LAYER].numpy()[:, row * look.token_grid[1] + column]
    region = weights[:, row * cells : (row + 1) * cells, column * cells : (column + 1) * cells]
    pixels = page.image(0).crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
    heads = right.subplots(2, -(-len(region) // 2)).flatten()
    right.suptitle(f"Where the boxed token re-reads, before layer {SHOWN_LAYER}", fontsize=10, fontweight="bold")
    for head, (panel, weight) in enumerate(zip(heads, region, strict=False)):
        panel.imshow(pixels, extent=(0, cells, cells, 0))
        panel.imshow(weight, extent=(0, cells, cells, 0), cmap="Greens", vmin=0, vmax=1, alpha=0.55)
        for y in range(cells):
            for x in range(cells):
                panel.text(x + 0.5, y + 0.85, f"{weight[y, x]:.0%}", ha="center", va="center", fontsize=8)
        panel.set_title(f"head {head + 1}", fontsize=8, fontweight="normal")
        panel.set_xticks([])
        panel.set_yticks([])
    for unused in heads[len(region) :]:
        unused.set_axis_off()
    return figure


def _smooth(values: np.ndarray, window: int = 8) -> np.ndarray:
    """Running mean over up to `window` values, ending at each of them."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _show_page(axes: Axes, page: Pages) -> None:
    axes.imshow(page.image(0), extent=(0, SIZE, SIZE, 0), interpolation="nearest")
    axes.set_axis_off()


def _draw_reading(axes: Axes, words: list[str], truth: list[str]) -> None:
    """Letters as a grid in the upper half, bars and shapes as drawn by the answers in the lower half."""
    axes.set(xlim=(0, GRID), ylim=(GRID, 0), aspect="equal", xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(True)

    def write(x: float, y: float, column: int, text: str, size: float) -> None:
        colour = INK if words[column] == truth[column] else WRONG
        weight = "normal" if colour == INK else "bold"
        axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour, fontweight=weight)

    letters, heights, colours, places, page = (kind.columns for kind in KINDS)
    for column in letters:
        row, place = divmod(column, TEXT_COLUMNS)
        write(place + 0.5, row + 0.5, column, words[column] if words[column] in LETTERS else "?", 7.5)
    for bar, column in enumerate(heights):
        right = words[column] == truth[column]
        known = words[column] in HEIGHTS
        height = int(words[column]) * 5 / BAR_HEIGHTS if known else 0
        colour = "#7b8794" if right else WRONG
        axes.add_patch(Rectangle((bar + 0.1, GRID - height), 0.8, height, facecolor=colour))
        write(bar + 0.5, GRID - height - 0.4, column, words[column] if known else "?", 6)
    for shape, (colour_column, place_column) in enumerate(zip(colours, places, strict=True)):
        name = SHAPES[shape]
        line = TEXT_ROWS + 0.7 + 1.3 * shape
        write(BARS + 3, line, colour_column, f"{words[colour_column]} {name}", 6)
        write(BARS + 3, line + 0.55, place_column, words[place_column], 5)
    for line, column in enumerate(page):
        write(BARS + 1.5 + 3 * line, GRID - 0.35, column, words[column], 5)
