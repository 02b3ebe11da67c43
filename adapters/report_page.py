"""The page of a report: its figures, and the template filled in."""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import io
from pathlib import Path
from typing import Any

import numpy as np

import vision_remember
from vision_remember.adapters.report_data import Picture, Report
from vision_remember.analysis import AttentionDensity, RegionAttention
from vision_remember.grid import region

try:
    import jinja2
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(
        f"the report needs {error.name}, which is not installed: pip install 'vision-remember[demo]'"
    ) from error

INK, FAINT, LINE = "#1f2933", "#9aa5b1", "#e4e7eb"
GROUPS = {"vision": "#0b7a75", "text": "#d9822b", "system": "#8e5bb5"}
STYLE: dict[str, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_WIDTH, _DPI = 9.6, 144
_COLUMNS = 8
"""Heads, or tiles, beside each other."""
_NUMBERED = 16
"""Cells of the largest region whose weights are written into it."""


def rendered(report: Report) -> str:
    """The page, with its figures inside."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        images = {
            "saliency": _saliency_figure(report),
            "tiles": _tiles_figure(report),
            "looks": [(layer, _look_figure(report, look)) for layer, look in report.looks.items()],
            "density": _density_figure(report),
        }
    return template(Path(__file__).with_name("report.html.j2")).render(
        report=report,
        images=images,
        heads={layer: look.weights.shape[1] for layer, look in report.looks.items()},
        local=all(look.window is not None for look in report.looks.values()),
        numbered=all(look.in_region(0, *report.token)[0].numel() <= _NUMBERED for look in report.looks.values()),
        date=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        versions={
            "vision-remember": vision_remember.__version__,
            **{name: importlib.metadata.version(name) for name in ("transformers", "torch")},
        },
    )


def template(path: Path) -> jinja2.Template:
    """A page to fill in: what goes in is escaped, and a name that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)


def _saliency_figure(report: Report) -> str | None:
    """The picture, and the map over it, both as the map's geometry has them."""
    if report.saliency is None or report.saliency.stitched is None:
        return None
    # What the encoder saw of a single tile may be a crop; stitched tiles cover the whole picture.
    single = len(report.saliency.tiles) == 1
    picture = report.tiles[0] if single and report.tiles else report.image
    height, width = picture.shape[:2]
    side = _WIDTH / 2 * min(1.2, height / width)
    figure = Figure(figsize=(_WIDTH, side + 0.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    _show(left, picture)
    left.set_title("as the encoder saw it" if single and report.tiles else "the picture")
    _show(right, picture)
    shown = right.imshow(
        report.saliency.stitched.cpu().float().numpy(), extent=(0, width, height, 0), cmap="magma", alpha=0.62, zorder=2
    )
    if report.looks and single:
        _box(right, report, picture)
        right.set_title("saliency; the box is the token drawn below")
    else:
        right.set_title("saliency")
    figure.colorbar(shown, ax=right, shrink=0.8, pad=0.02)
    return _png(figure)


def _tiles_figure(report: Report) -> str | None:
    """Each tile with its own map, in the order in which the encoder has them; for images of several."""
    if report.saliency is None or len(report.saliency.tiles) == 1:
        return None
    maps = report.saliency.tiles.cpu().float().numpy()
    columns = min(len(maps), _COLUMNS // 2)
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(_WIDTH, _WIDTH / columns * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for number, (axes, tile) in enumerate(zip(panels, maps, strict=False)):
        height, width = report.tiles[number].shape[:2] if report.tiles else tile.shape
        if report.tiles:
            _show(axes, report.tiles[number])
        axes.imshow(
            tile, extent=(0, width, height, 0), cmap="magma", alpha=0.62, vmin=maps.min(), vmax=maps.max(), zorder=2
        )
        axes.set_title(f"tile {number}")
        axes.set_axis_off()
        if number == 0 and report.looks and report.tiles:
            _box(axes, report, report.tiles[0])
    for unused in panels[len(maps) :]:
        unused.set_axis_off()
    return _png(figure)


def _look_figure(report: Report, look: RegionAttention) -> str:
    """Where the chosen token looks, head by head: its region with the picture under it, or all of its tile."""
    row, column = report.token
    picture = _first_tile(report)
    if look.window is None:
        figure = Figure(figsize=(_WIDTH / 2, _WIDTH / 2), layout="constrained")
        axes = figure.subplots()
        if picture is not None:
            _show(axes, picture)
        H, W = look.feature_grid
        height, width = picture.shape[:2] if picture is not None else (H, W)
        mean = look.over_tile(0, row, column).mean(0).cpu().float().numpy()
        axes.imshow(mean, extent=(0, width, height, 0), cmap="viridis", alpha=0.62, zorder=2)
        axes.set_title("mean over heads, over the whole tile")
        axes.set_axis_off()
        return _png(figure)
    weights = look.in_region(0, row, column).cpu().float().numpy()
    heads, rows, columns = weights.shape
    across = min(heads, _COLUMNS)
    down = -(-heads // across)
    size = _WIDTH / _COLUMNS
    figure = Figure(figsize=(size * across, (size * rows / columns + 0.25) * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    under = None if picture is None else _pixels_of_region(picture, look, row, column)
    for head, (axes, weight) in enumerate(zip(panels, weights, strict=False)):
        if under is not None:
            axes.imshow(under, extent=(0, columns, rows, 0))
        axes.imshow(weight, extent=(0, columns, rows, 0), cmap="Greens", vmin=0, vmax=1, alpha=0.6)
        if rows * columns <= _NUMBERED:
            for y, x in np.ndindex(rows, columns):
                axes.text(x + 0.5, y + 0.5, f"{weight[y, x]:.0%}", ha="center", va="center", fontsize=7)
        axes.set_title(f"head {head}", fontsize=7, pad=2)
        axes.set_xticks([])
        axes.set_yticks([])
    for unused in panels[heads:]:
        unused.set_axis_off()
    return _png(figure)


def _density_figure(report: Report) -> str | None:
    """Density by layer on a log scale; what the blocks change is between the solid and the dashed line."""
    if report.density is None or report.plain_density is None:
        return None
    figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    for group, colour in GROUPS.items():
        for found, dashes, label in ((report.plain_density, "--", None), (report.density, "-", group)):
            _curve(axes, found, group, dashes, colour, label)
    axes.axhline(1, color=FAINT, linewidth=0.8)
    for layer in report.looks or map(int, report.attached["before layers"].split(", ")):
        axes.axvline(layer, color=LINE, linewidth=4, zorder=0)
    axes.plot([], [], "--", color=INK, label="without Vision Remember")
    axes.set(xlabel="decoder layer", ylabel="density (1: a uniform share)", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper")
    return _png(figure)


def _curve(axes: Axes, found: AttentionDensity, group: str, dashes: str, colour: str, label: str | None) -> None:
    curve = found.per_layer(group)
    if not curve.isnan().all():
        values = curve.clamp(min=1e-4).numpy()  # zero has no place on a log scale
        axes.plot(np.arange(len(curve)), values, "." + dashes, color=colour, label=label, markersize=4)


def _first_tile(report: Report) -> Picture | None:
    """The picture under the first tile: the tile itself, or the whole image where there is no other."""
    if report.tiles:
        return report.tiles[0]
    single = report.saliency is not None and len(report.saliency.tiles) == 1
    single = single or any(len(look.weights) == 1 for look in report.looks.values())
    return report.image if single else None


def _bounds(look: RegionAttention, row: int, column: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first, stop) of the rows and of the columns of cells that a token sees."""
    window = look.window or 1
    bounds = []
    for at, tokens, cells in zip((row, column), look.token_grid, look.feature_grid, strict=True):
        first = at - at % window
        bounds.append(region(first, min(first + window, tokens), tokens, cells))
    return bounds[0], bounds[1]


def _pixels_of_region(picture: Picture, look: RegionAttention, row: int, column: int) -> Picture:
    (top, bottom), (left, right) = _bounds(look, row, column)
    (height, width), (H, W) = picture.shape[:2], look.feature_grid
    rows, columns = slice(top * height // H, -(-bottom * height // H)), slice(left * width // W, -(-right * width // W))
    return picture[rows, columns]


def _box(axes: Axes, report: Report, picture: Picture) -> None:
    look = next(iter(report.looks.values()))
    (top, bottom), (left, right) = _bounds(look, *report.token)
    (height, width), (H, W) = picture.shape[:2], look.feature_grid
    corner, size = (left * width / W, top * height / H), ((right - left) * width / W, (bottom - top) * height / H)
    for colour, thickness in (("black", 3.0), ("white", 1.4)):
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=thickness, zorder=3))


def _show(axes: Axes, picture: Picture) -> None:
    axes.imshow(picture, extent=(0, picture.shape[1], picture.shape[0], 0))
    axes.set_axis_off()


def _png(figure: Figure) -> str:
    """A figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
