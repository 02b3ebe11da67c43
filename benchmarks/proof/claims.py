"""What the paper claims, as comparisons between arms that the runs decide."""

from __future__ import annotations

from dataclasses import dataclass

DETAIL = "OCR & Chart"


@dataclass(frozen=True)
class Claim:
    """One arm is better than another, or no worse.

    Attributes:
        text: In words.
        where: Where the paper says so, with its numbers.
        better: Name of the arm that is claimed to be better.
        worse: The other.
        on: Which group of tasks, or which task; None for all.
        margin: Points that the "better" arm may lose and still be no worse; None where it has to be better.
    """

    text: str
    where: str
    better: str
    worse: str
    on: str | None = None
    margin: float | None = None


SELA, BASE, LAST = "+ SELA", "baseline (average pool)", "+ resample (deformable, last level)"

CLAIMS = (
    Claim("Pooling loses detail", "Table 5a: 47.5 to 44.8", "no compression", "pooled 1/4"),
    Claim("Vision Remember wins it back", "Table 5a: 44.8 to 47.1", "pooled 1/4 + VR", "pooled 1/4"),
    Claim("It reads text and charts better", "Table 4a: 39.7 to 45.7", "pooled 1/4 + VR", "pooled 1/4", DETAIL),
    *(
        Claim(
            f"{group} is level or up",
            "Table 4a: all groups are",
            "pooled 1/4 + VR",
            "pooled 1/4",
            group,
            margin=1.0,
        )
        for group in ("General", "Knowledge", "Vision-Centric")
    ),
    *(
        Claim(
            f"`{task}`, which needs no detail, is level or up",
            "not in the paper",
            "pooled 1/4 + VR",
            "pooled 1/4",
            task,
            margin=1.0,
        )
        for task in ("attribute", "marked_patch")
    ),
    Claim(
        "It comes within a point of no compression",
        "Table 5a: 47.5 to 47.1",
        "pooled 1/4 + VR",
        "no compression",
        margin=1.0,
    ),
    Claim(
        "With saliency that takes nothing away it comes within a point",
        "not in the paper",
        "1/4: saliency that takes nothing away",
        "no compression",
        margin=1.0,
    ),
    Claim("It helps average pooling", "Table 2: +2.3", "average pool + VR", "average pool"),
    Claim("It helps PixelShuffle", "Table 2: +2.5", "PixelShuffle + VR", "PixelShuffle"),
    Claim("It helps deformable pooling", "Table 2: +2.2", "deformable + VR", "deformable"),
    Claim("It helps LDPv2", "Table 2: +2.6", "LDPv2 + VR", "LDPv2"),
    Claim("It helps TokenPacker", "not in Table 2", "TokenPacker + VR", "TokenPacker"),
    Claim("Resampling helps", "Table 4a: +0.4", LAST, BASE),
    Claim("Several levels help", "Table 4a: +0.8", "+ multi-level", LAST),
    Claim("SELA helps over deformable attention", "Table 4a: +1.0", SELA, "+ multi-level"),
    Claim("Saliency helps SELA", "never isolated", SELA, "window position alone"),
    Claim(
        "Saliency that takes nothing away beats the paper's factor",
        "not in the paper",
        "1/4: saliency that takes nothing away",
        "pooled 1/4 + VR",
    ),
    Claim(
        "Saliency that takes nothing away beats none",
        "not in the paper",
        "1/4: saliency that takes nothing away",
        "window position alone",
    ),
    Claim(
        "One block before layer 1 does as well as two",
        "Table 4c: 46.8 to 47.1",
        "1/4: saliency that takes nothing away, before 1 alone",
        "1/4: saliency that takes nothing away",
        margin=1.0,
    ),
    Claim(
        "The paper's map helps over its mean everywhere",
        "never isolated",
        "pooled + VR",
        "pooled + VR, 0.5 for every cell",
    ),
    Claim(
        "The map of 1 + sigmoid helps over its mean everywhere",
        "not in the paper",
        "pooled + VR, 1 + sigmoid",
        "pooled + VR, 1.5 for every cell",
    ),
    Claim(
        "A larger update alone helps: a factor of 1.5 beats none",
        "not in the paper",
        "pooled + VR, 1.5 for every cell",
        "pooled + VR, no saliency",
    ),
    Claim("Saliency alone helps", "never isolated", "saliency alone", "neither saliency nor position"),
    Claim("The start on one cell per head helps", "not in the paper", SELA, "saliency alone"),
    Claim(
        "Deformable attention gains by such a start too",
        "not in the paper",
        "deformable, no saliency, each head on a cell",
        "deformable, no saliency",
    ),
    Claim(
        "SELA beats deformable attention that starts so",
        "not in the paper",
        "pooled + VR, no saliency",
        "deformable, no saliency, each head on a cell",
    ),
    Claim("A zero output is better than a zero gate", "not in the paper", SELA, "zero gate"),
    Claim(
        "SELA as we start it is better than the paper as printed",
        "not in the paper",
        SELA,
        "the paper as printed",
    ),
    Claim("SELA beats deformable attention", "Table 4b: 47.1 to 46.1", "SELA", "deformable attention"),
    Claim(
        "Deformable attention beats global",
        "Table 4b: 46.1 to 36.7",
        "deformable attention",
        "global attention",
    ),
    Claim("Global attention hurts", "Tables 4a, 4b: 44.8 to 36.7", BASE, "global attention"),
    Claim("A second block helps", "Table 4c: 46.8 to 47.1", "1, 4", "1"),
    Claim("A third block hurts", "Table 4c: 47.1 to 46.0", "1, 4", "1, 4, 7"),
    Claim("Early blocks beat late ones", "section 5.4, in words", "1", "7"),
    Claim(
        "The gain is not that of more parameters",
        "no such control",
        "pooled + VR",
        "pooled + MLP of equal parameters",
    ),
    Claim(
        "The gain is not that of more compute",
        "no such control",
        "pooled + VR",
        "pooled + MLP of equal compute",
    ),
    *(
        Claim(
            f"SELA beats adding features (DeepStack), both with {name}",
            "not compared",
            sela,
            other,
        )
        for name, sela, other in (
            ("sigmoid", "pooled 1/4 + VR", "DeepStack, sigmoid"),
            ("1 + sigmoid", "1/4: saliency that takes nothing away", "DeepStack, 1 + sigmoid"),
            ("no saliency", "window position alone", "DeepStack, no saliency"),
        )
    ),
)
