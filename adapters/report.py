"""Writes a report on one image and one question: a single HTML file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from vision_remember.adapters.report_data import Report, make_report
from vision_remember.grid import Grid


def write_report(
    model: nn.Module,
    processor: Any,
    image: Any,
    question: str,
    path: str | os.PathLike[str],
    *,
    token: Grid | None = None,
    max_new_tokens: int = 64,
) -> Report:
    """Writes what :func:`make_report` finds as one HTML file that needs no other.

    Args:
        model: a model that Vision Remember is attached to; it runs in the mode that it is in.
        processor: the model's.
        image: a PIL image.
        question: about it.
        path: of the file to write; its folder is made if missing.
        token: (row, column) in the first tile, the token whose attention is drawn; None for the most salient one.
        max_new_tokens: of each answer.

    Returns:
        What was found.

    Raises:
        ImportError: the libraries that draw are not installed: ``pip install 'vision-remember[demo]'``.
        ValueError: a token outside the tile, or a processor that cannot make a prompt.
        RuntimeError: nothing is attached.
    """
    from vision_remember.adapters.report_page import rendered  # needs the libraries that draw

    report = make_report(model, processor, image, question, token=token, max_new_tokens=max_new_tokens)
    html = rendered(report)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html, encoding="utf-8")
    return report
