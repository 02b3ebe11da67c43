"""Writes the tables of ``docs/projectors.md``; with ``--check`` it only says whether they are up to date.

Every entry of ``PROJECTORS`` is built and run on the meta device, so that the page says what the code does. What code
cannot know about itself, where a projector comes from, is in ``SOURCES``.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vision_remember import PROJECTORS, build_projector
from vision_remember.grid import Grid
from vision_remember.projectors import Projector

PAGE = Path(__file__).with_name("projectors.md")
BEGIN = "<!-- Written by docs/make_projector_table.py; do not edit by hand. -->"
END = "<!-- End of what docs/make_projector_table.py writes. -->"

RATIO = 4
FEATURE_WIDTH = 1024  # CLIP-L
WIDTHS = {"0.5B": 896, "7B": 3584}  # Qwen2
GRIDS: tuple[Grid, ...] = ((24, 24), (27, 27), (16, 36))
FITS = ("pad", "resize")


class Work(NamedTuple):
    """A paper and its code.

    Attributes:
        name: what the paper calls its method or model.
        arxiv: its number.
        repository: on GitHub; None where the authors published none.
        licence: of the code, not of weights.
    """

    name: str
    arxiv: str
    repository: str | None
    licence: str


NO_LICENCE = "no licence file; package metadata says Apache"
HONEYBEE = Work("Honeybee", "2312.06742", "khanrc/honeybee", "Apache-2.0 (weights: CC-BY-NC-4.0)")
MOBILEVLM = "Meituan-AutoML/MobileVLM"

SOURCES: dict[str, tuple[Work, ...]] = {
    "adaptive_avg_pool": (
        Work("Vision Remember", "2506.03928", None, "no code published"),
        Work("DeCo", "2405.20985", "yaolinli/DeCo", "BSD-3-Clause"),
    ),
    "c_abstractor": (HONEYBEE,),
    "d_abstractor": (HONEYBEE,),
    "deformable_pool": (Work("MoME", "2407.12709", "JiuTian-VL/MoME", "MIT, but no code published"),),
    "honeybee_resampler": (HONEYBEE,),
    "ldp": (Work("MobileVLM", "2312.16886", MOBILEVLM, "Apache-2.0"),),
    "ldpv2": (Work("MobileVLM V2", "2402.03766", MOBILEVLM, "Apache-2.0"),),
    "matryoshka": (Work("M3", "2405.17430", "mu-cai/matryoshka-mm", "Apache-2.0"),),
    "mlp": (Work("LLaVA-1.5", "2310.03744", "haotian-liu/LLaVA", "Apache-2.0"),),
    "pixel_shuffle": (
        Work("InternVL 1.5", "2404.16821", "OpenGVLab/InternVL", "MIT"),
        Work("Idefics3", "2408.12637", "huggingface/transformers", "Apache-2.0"),
    ),
    "qformer": (Work("BLIP-2", "2301.12597", "salesforce/LAVIS", "BSD-3-Clause"),),
    "quecc": (Work("QueCC", "2411.03312", "locuslab/llava-token-compression", NO_LICENCE),),
    "resampler": (
        Work("Qwen-VL", "2308.12966", "QwenLM/Qwen-VL", "Tongyi Qianwen licence"),
        Work("MiniCPM-V", "2408.01800", "OpenBMB/MiniCPM-V", "Apache-2.0"),
    ),
    "stf": (Work("LLaVA-STF", "2506.07138", "visresearch/LLaVA-STF", "CC-BY-NC-4.0"),),
    "token_packer": (Work("TokenPacker", "2407.02392", "CircleRadon/TokenPacker", NO_LICENCE),),
}


def check_sources(names: Iterable[str]) -> None:
    """Raises ValueError unless ``SOURCES`` says where exactly these projectors come from."""
    missing, unknown = sorted(set(names) - SOURCES.keys()), sorted(SOURCES.keys() - set(names))
    if missing or unknown:
        raise ValueError(
            f"SOURCES lacks {missing} and has {unknown}, which no projector is called: edit {Path(__file__).name}"
        )


def on_meta(name: str, out_dim: int, **options: Any) -> Projector:
    """The projector at the table's ratio, without memory; one that cannot compress keeps the grid."""
    with torch.device("meta"):
        projector = build_projector(name, FEATURE_WIDTH, out_dim, ratio=RATIO, **options)
        try:
            projector.out_grid(GRIDS[0])
        except ValueError:
            projector = build_projector(name, FEATURE_WIDTH, out_dim, ratio=1, **options)
    return projector


def forward(projector: Projector, grid: Grid) -> Tensor:
    """(1, h*w, D), of one image on ``grid``."""
    features = torch.empty(1, math.prod(grid), projector.feature_dim, device="meta")
    text: dict[str, Tensor] = {}
    if projector.needs_text:
        text = {"text": torch.empty(1, getattr(projector, "text_dim", projector.out_dim), device="meta")}
    return projector(features, grid, **text)


def token_grid(projector: Projector, grid: Grid) -> Grid | None:
    """The grid that both ``out_grid`` and a forward make of ``grid``; None where the projector refuses it."""
    try:
        h, w = projector.out_grid(grid)
    except ValueError:
        return None
    shape = tuple(forward(projector, grid).shape)
    assert shape == (1, h * w, projector.out_dim), f"{type(projector).__name__}: out_grid says {h}x{w}, forward {shape}"
    return h, w


def served(name: str, grid: Grid) -> str:
    """What the projector makes of ``grid``, as a cell of the table."""
    width = min(WIDTHS.values())
    made = token_grid(on_meta(name, width), grid)
    if made is not None:
        return by(made)
    if "fit" in inspect.signature(PROJECTORS[name]).parameters:
        for fit in FITS:
            made = token_grid(on_meta(name, width, fit=fit), grid)
            if made is not None:
                return f"{by(made)}, with `fit`"
    return "refused"


def multiply_adds(projector: Projector) -> int:
    """Those of matrix products and convolutions, for one image on the first grid."""
    # Other kernels are not known to the counter of every torch version.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(projector, GRIDS[0])
    return counter.get_total_flops() // 2


def by(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def cost_row(name: str) -> list[str]:
    cls = PROJECTORS[name]
    projectors = [on_meta(name, width) for width in WIDTHS.values()]
    levels = len(cls.encoder_levels)
    return [
        f"`{name}`",
        str(math.prod(projectors[0].out_grid(GRIDS[0]))),
        *(f"{sum(p.numel() for p in projector.parameters()) / 1e6:.2f}" for projector in projectors),
        *(f"{multiply_adds(projector) / 1e9:.2f}" for projector in projectors),
        f"{levels}: {', '.join(map(str, cls.encoder_levels))}" if levels else "1",
        *(served(name, grid) for grid in GRIDS),
        "raster" if cls.spatial else "none",
        "yes" if cls.needs_text else "no",
    ]


def source_row(name: str) -> list[str]:
    works = SOURCES[name]
    papers = [f"{work.name}, [{work.arxiv}](https://arxiv.org/abs/{work.arxiv})" for work in works]
    code = [f"[{work.repository}](https://github.com/{work.repository})" if work.repository else "–" for work in works]
    return [f"`{name}`", *("<br>".join(cells) for cells in (papers, code, [work.licence for work in works]))]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: range = range(0)) -> str:
    """A table; the columns ``numbers`` are flushed right."""
    rule = ["--:" if i in numbers else "---" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


@cache
def tables() -> str:
    """What stands between the markers."""
    check_sources(PROJECTORS)
    sizes = list(WIDTHS)
    header = [
        "projector",
        "tokens",
        *(f"parameters, {size} (M)" for size in sizes),
        *(f"multiply-adds, {size} (G)" for size in sizes),
        "encoder levels",
        *(f"from {by(grid)}" for grid in GRIDS),
        "token order",
        "needs text",
    ]
    costs = markdown(header, map(cost_row, PROJECTORS), numbers=range(1, 2 + 2 * len(sizes)))
    sources = markdown(["projector", "paper", "its code", "licence of that code"], map(source_row, PROJECTORS))
    return f"{costs}\n\n### Where they come from\n\n{sources}"


def updated(page: str) -> str:
    """The page with the tables as they should be.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r} in this order, once each")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None, *, page: Path = PAGE) -> int:
    """Writes the page, or with ``--check`` returns 1 if it is out of date."""
    parser = argparse.ArgumentParser(description="Writes the tables of docs/projectors.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    check = parser.parse_args(arguments).check
    text = page.read_text(encoding="utf-8")
    wanted = updated(text)
    if text == wanted:
        return 0
    if check:
        print(f"{page.name} is out of date: run python docs/{Path(__file__).name}", file=sys.stderr)
        return 1
    page.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
