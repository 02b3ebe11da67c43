"""VoCo-LLaMA's attention mask: text after the compression tokens sees nothing in front of them (arXiv 2406.12275)."""

from __future__ import annotations

import torch
from torch import Tensor


def voco_mask(is_voco: Tensor) -> Tensor:
    """Which positions each position of a decoder may see, for compression inside the decoder.

    A few compression tokens stand behind the image. Up to the last of them attention is causal as ever. The positions
    after it see, causally, what begins with the first of them: neither the image nor any text before it. So the cache
    of all that stands before them can be dropped once they are computed. It makes no fewer tokens at prefill, and is no
    projector: hand it to a model as its attention mask.

    Args:
        is_voco: (B, S), bool, the compression tokens. Those of a sequence stand together; a sequence without any is
            causal throughout.

    Returns:
        (B, S, S), bool; entry (b, i, j) says whether position i sees position j.

    Raises:
        ValueError: another shape or dtype.
    """
    if is_voco.ndim != 2 or is_voco.dtype != torch.bool:
        raise ValueError(f"is_voco {tuple(is_voco.shape)} {is_voco.dtype}: expected bool (B, S)")
    begun = is_voco.long().cumsum(1) > 0  # from the first of them on
    to_come = is_voco.long().flip(1).cumsum(1).flip(1) > 0  # up to the last of them
    after = begun & ~to_come
    causal = torch.ones(is_voco.shape[1:] * 2, dtype=torch.bool, device=is_voco.device).tril()
    return causal & (~after.unsqueeze(2) | begun.unsqueeze(1))
