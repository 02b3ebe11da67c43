"""How large a proof is: every number that decides the results, besides the code."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from examples.demo.schedule import Recipe


@dataclass(frozen=True)
class Shape:
    """Sizes of the models.

    Attributes:
        grid: Encoder cells per side.
        cell: Pixels per side of a cell, which is one patch.
        vision_width: C, width of the encoder.
        vision_layers: Its depth.
        text_width: D, width of the decoder.
        text_layers: Its depth.
        heads: Attention heads of both.
    """

    grid: int = 12
    cell: int = 8
    vision_width: int = 96
    vision_layers: int = 6
    text_width: int = 128
    text_layers: int = 8
    heads: int = 4


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe(Recipe):
    """How the decoder of one compression ratio is pretrained.

    Attributes:
        side: Cells per side of the tokens that it learns to read, besides those of one cell.
    """

    side: int


@dataclass(frozen=True)
class Level:
    """Everything that decides a proof's numbers.

    Attributes:
        name: What the command line calls it.
        shape: Sizes of the models.
        detail: The level of detail of the pages, as `vision_remember.synth` names it.
        tasks: The tasks; empty for all.
        text_tokens: Positions for the questions about one page; further questions are left out.
        symbol_pages: Pages per task that the decoder is pretrained on, as symbols, never as pixels.
        train_pages: Pages per task that encoder and arms train on.
        validation_pages: Pages per task behind every choice and every curve.
        test_pages: Pages per task behind the tables; no choice looks at them.
        encoder: How the encoder is pretrained.
        decoders: How the decoders are pretrained, one per compression ratio, each from the one before.
        reads_enough: Share of look-ups on new pages that a decoder has to get right, with tokens of as many cells as
            an arm's, for the arm to be run.
        arm: How every arm is trained.
        check_every: Steps between two points of a curve.
        prefill_repeats: Timed forward passes per arm.
        device: Where it runs.
        threads: Threads of one process.
        half: Whether matrix products run in bfloat16.
    """

    name: str
    shape: Shape = field(default_factory=Shape)
    detail: str = "medium"
    tasks: tuple[str, ...] = ()
    text_tokens: int = 48
    symbol_pages: int = 2048
    train_pages: int = 384
    validation_pages: int = 16
    test_pages: int = 48
    encoder: Recipe = field(default_factory=lambda: Recipe(steps=400, batch=32))
    decoders: tuple[DecoderRecipe, ...] = (
        DecoderRecipe(side=2, steps=1000, batch=32),
        DecoderRecipe(side=3, steps=2000, batch=32),
        DecoderRecipe(side=4, steps=3500, batch=32),
    )
    reads_enough: float = 0.8
    arm: Recipe = field(default_factory=lambda: Recipe(steps=250, batch=16))
    check_every: int = 50
    prefill_repeats: int = 15
    device: str = "cpu"
    threads: int = 1
    half: bool = False

    def decoders_until(self, side: int) -> tuple[DecoderRecipe, ...]:
        """The recipes behind the decoder for tokens of side x side cells: its own, and those it begins from."""
        return self.decoders[: [recipe.side for recipe in self.decoders].index(side) + 1]


CPU = Level(
    "cpu",
    tasks=(
        *("figures", "attribute"),
        *("arrows", "gear_board"),
        *("characters", "digits", "gauges"),
        *("boxes", "marked_patch"),
    ),
)
"""Tasks that a small decoder learns in minutes: what stands in a cell that the question names, or beside a name."""
LONG = replace(CPU, name="long", arm=replace(CPU.arm, steps=1000), check_every=200)
"""Four times the steps, on the same pages, encoder and decoders: who is only slow?"""
GPU = Level(
    "gpu",
    tasks=CPU.tasks,
    shape=Shape(grid=24, cell=8, vision_width=256, vision_layers=12, text_width=512, text_layers=12, heads=8),
    text_tokens=96,
    symbol_pages=2048,
    train_pages=512,
    validation_pages=16,
    test_pages=48,
    encoder=Recipe(steps=700, batch=32, lr=1e-3, warmup=80),
    decoders=(
        DecoderRecipe(side=2, steps=2000, batch=64, lr=5e-4, warmup=60),
        DecoderRecipe(side=3, steps=5000, batch=64, lr=5e-4, warmup=60),
        DecoderRecipe(side=4, steps=8000, batch=64, lr=5e-4, warmup=60),
    ),
    arm=Recipe(steps=400, batch=32, lr=5e-4),
    check_every=100,
    device="cuda",
    half=True,
)
TINY = replace(
    CPU,
    name="tiny",
    shape=replace(CPU.shape, vision_width=32, vision_layers=4, text_width=32, text_layers=8),
    symbol_pages=8,
    train_pages=8,
    validation_pages=2,
    test_pages=4,
    encoder=Recipe(steps=2, batch=4),
    decoders=tuple(DecoderRecipe(side=side, steps=4, batch=4) for side in (2, 3, 4)),
    reads_enough=0.0,
    arm=Recipe(steps=3, batch=4),
    check_every=2,
    prefill_repeats=2,
)
LEVELS = {level.name: level for level in (CPU, LONG, GPU, TINY)}
"""By name; "tiny" runs every line in seconds and learns nothing."""
