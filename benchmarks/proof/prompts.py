"""Questions as the model's own forward takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from .pages import Pages
from .words import IMAGE, PAD


def prompts(pages: Pages, tokens: int, index: Tensor, question: int, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """One question of each page, as the model's own forward takes it: pixels in, prompts padded on the left.

    Args:
        pages: The pages.
        tokens: Vision tokens of a page.
        index: Which of them, (B,).
        question: Number of the question on its page.
        device: Where the tensors go.

    Returns:
        The inputs, and the right word (B,); -1 where a page has no such question or its answer is not one word.
    """
    streams, rows, truth = pages.streams, [], []
    for page in index.tolist():
        own = (streams.branch[page] == question).nonzero()[:, 0]
        targets = streams.target[page, own]
        one_word = int((targets >= 0).sum()) == 1
        asked = own[: int((targets >= 0).nonzero()[0]) + 1]  # up to the position that answers
        rows.append([IMAGE] * tokens + streams.tokens[page, asked].tolist())
        truth.append(int(targets.max()) if one_word else -1)
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows])
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    inputs = {
        "input_ids": ids.to(device),
        "attention_mask": (torch.arange(longest) >= padding[:, None]).long().to(device),
        "pixel_values": pages.pixel_values(index, device),
    }
    return inputs, torch.tensor(truth, device=device)
