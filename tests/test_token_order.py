"""Two facts about the order of tokens in other models: where they stand, and what they may see."""

from __future__ import annotations

import pytest
import torch

from vision_remember.arrangement import block_order
from vision_remember.ops import voco_mask


def test_qwen2_vl_s_patches_stand_block_by_block() -> None:
    """Its processor's order for 4x4 cells, and back; the places of raster cells undo it."""
    standing = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])
    raster = torch.arange(16)
    blocks = raster.view(2, 2, 2, 2).permute(0, 2, 1, 3).flatten()
    assert torch.equal(blocks, standing)
    assert torch.equal(standing[block_order((4, 4), 2)], raster)
    wide = torch.arange(24).view(2, 2, 3, 2).permute(0, 2, 1, 3).flatten()
    assert torch.equal(wide[block_order((4, 6), 2)], torch.arange(24))


def voco(kinds: str) -> torch.Tensor:
    """A sequence of t(ext), i(mage), v(oco) and q(uestion)."""
    return torch.tensor([kind == "v" for kind in kinds])


def test_the_question_sees_compression_tokens_and_itself_alone() -> None:
    (mask,) = voco_mask(voco("tiiiivvqqq")[None])
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    assert torch.equal(mask[:7], causal[:7])
    assert mask[7:].int().tolist() == [
        [0, 0, 0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
    ]


def test_a_sequence_without_compression_tokens_is_causal() -> None:
    plain, mixed = voco_mask(torch.stack([voco("tiiqq"), voco("tivqq")]))
    assert torch.equal(plain, torch.ones(5, 5, dtype=torch.bool).tril())
    assert not torch.equal(mixed, plain)
    assert mask_is_never_empty(mixed)


def mask_is_never_empty(mask: torch.Tensor) -> bool:
    return bool(mask.any(-1).all())


def test_what_stands_before_the_compression_tokens_cannot_reach_the_answer() -> None:
    """One layer of attention with the mask, and a second: the way round leads through the compression tokens alone."""
    generator = torch.Generator().manual_seed(0)
    mask = voco_mask(voco("tiiivqq")[None])
    hidden = torch.randn(1, 7, 8, generator=generator, dtype=torch.float64)
    other = hidden.clone()
    other[:, 1] += 1

    def attend(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    assert torch.equal(attend(hidden)[:, 5:], attend(other)[:, 5:])
    assert not torch.allclose(attend(attend(hidden))[:, 5:], attend(attend(other))[:, 5:])


@pytest.mark.parametrize("wrong", [torch.zeros(3, dtype=torch.bool), torch.zeros(1, 3)])
def test_anything_but_a_batch_of_booleans_is_an_error(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"is_voco .*expected bool \(B, S\)"):
        voco_mask(wrong)
