"""The tables that the paper prints (arXiv 2506.03928, version 1), and how its averages are made.

Scores are in the paper's units: per cent, but a sum of categories for MME's perception half (at most 2000). OCRBench is
printed in per cent of its 1000 questions. Table headers that a text copy of the paper loses (MME-P, MMMU, SQA-I) are
recognised by the range of their values, and by the averages, which come out with them only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GROUPS: Mapping[str, tuple[str, ...]] = {
    "General": ("GQA", "MME-P"),
    "Knowledge": ("SQA-I", "AI2D", "MMMU", "MMStar"),
    "OCR & Chart": ("ChartQA", "DocVQA", "TextVQA", "OCRBench"),
    "Vision-Centric": ("RWQA", "CVBench-2D", "CVBench-3D"),
}

# in the order of the columns of tables 1 and 2; table 3 leaves three of them out
COLUMNS = (
    *("GQA", "MME-P", "MMStar", "MMMU", "SQA-I", "AI2D", "ChartQA", "DocVQA", "TextVQA"),
    *("OCRBench", "RWQA", "CVBench-2D", "CVBench-3D"),
)
COLUMNS_TABLE_3 = tuple(name for name in COLUMNS if name not in ("OCRBench", "CVBench-2D", "CVBench-3D"))

MME_POINTS_PER_PERCENT = 20  # ten categories of perception with up to 200 points


def per_cent(benchmark: str, score: float) -> float:
    """A score in the paper's units, in per cent.

    Raises:
        ValueError: not a benchmark of the paper, or a score outside of its range.
    """
    if benchmark not in COLUMNS:
        raise ValueError(f"{benchmark!r} is no benchmark of the paper; those are {', '.join(COLUMNS)}")
    percent = score / MME_POINTS_PER_PERCENT if benchmark == "MME-P" else score
    if not 0 <= percent <= 100:
        most = 100 * MME_POINTS_PER_PERCENT if benchmark == "MME-P" else 100
        raise ValueError(f"{benchmark}={score}: expected a score from 0 to {most}")
    return percent


def average(scores: Mapping[str, float]) -> float:
    """What the paper prints as "Avg": the mean over single benchmarks in per cent, not over groups.

    Args:
        scores: by benchmark, in the paper's units; all that are given count.
    """
    if not scores:
        raise ValueError("no scores to average")
    return sum(per_cent(name, score) for name, score in scores.items()) / len(scores)


def group_averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The mean of each group of table 4 whose benchmarks are all there.

    Args:
        scores: by benchmark, in the paper's units.
    """
    whole = {group: names for group, names in GROUPS.items() if all(name in scores for name in names)}
    return {group: average({name: scores[name] for name in names}) for group, names in whole.items()}


def average_of_groups(groups: Mapping[str, float]) -> float:
    """The same average from the four groups' means, each with the number of its benchmarks as weight."""
    if groups.keys() != GROUPS.keys():
        raise ValueError(f"groups {', '.join(groups)}: expected {', '.join(GROUPS)}")
    return sum(groups[name] * len(members) for name, members in GROUPS.items()) / len(COLUMNS)


@dataclass(frozen=True)
class Row:
    """A row of table 1, 2 or 3.

    Attributes:
        table: its number.
        label: model, method or projector.
        scores: by benchmark, in the paper's units.
        average: as printed.
        remember: with Vision Remember.
        parameters: as printed (table 3).
        ttft_ms: time to the first token (table 1).
    """

    table: int
    label: str
    scores: Mapping[str, float]
    average: float
    remember: bool = False
    parameters: str | None = None
    ttft_ms: float | None = None


@dataclass(frozen=True)
class GroupRow:
    """A row of table 4: the four groups instead of the benchmarks."""

    table: str
    label: str
    groups: Mapping[str, float]
    average: float


@dataclass(frozen=True)
class BudgetRow:
    """A row of table 5 (a)."""

    label: str
    tokens: int
    average: float


@dataclass(frozen=True)
class TimeRow:
    """A column of table 5 (b): time to the first token on one A100, RealWorldQA."""

    language_model: str
    tokens: int
    remember: bool
    ttft_ms: float


def _rows(table: int, columns: tuple[str, ...], text: str) -> tuple[Row, ...]:
    """Reads lines of ``label | with Vision Remember? | parameters or ms | scores | average``."""
    rows = []
    for line in text.strip().splitlines():
        label, remember, extra, scores, mean = (field.strip() for field in line.split("|"))
        parameters, ttft = (extra, None) if table == 3 else (None, float(extra) if extra else None)
        values = dict(zip(columns, map(float, scores.split()), strict=True))
        rows.append(Row(table, label, values, float(mean), remember == "yes", parameters, ttft))
    return tuple(rows)


def _groups(table: str, label: str, values: str, average: float) -> GroupRow:
    return GroupRow(table, label, dict(zip(GROUPS, map(float, values.split()), strict=True)), average)


# Efficient methods, the others run again by the authors; on Qwen2-1.5B, by the times, which agree with table 5 (b).
# GQA, MME-P, MMStar, MMMU, SQA-I, AI2D, ChartQA, DocVQA, TextVQA, OCRBench, RWQA, CVBench-2D, CVBench-3D
TABLE_1 = _rows(
    1,
    COLUMNS,
    """
FastV       | no  | 63.56 | 59.1 1318.9 35.6 33.6 68.7 61.6 50.7 54.1 56.0 40.4 53.1 51.5 33.2 | 51.0
PDrop       | no  | 75.76 | 59.8 1314.0 38.0 34.0 68.4 61.6 47.2 56.8 55.8 40.6 54.9 51.4 32.3 | 51.3
DeCo        | no  | 48.48 | 62.0 1324.2 37.5 33.7 64.8 61.8 50.3 53.8 50.6 37.9 53.6 58.2 24.3 | 50.4
TokenPacker | no  | 51.95 | 61.3 1332.9 37.7 32.8 66.0 63.1 52.3 52.5 51.5 38.6 55.0 55.2 32.6 | 51.2
Ours        | yes | 52.12 | 62.7 1374.3 35.4 32.9 66.9 63.3 56.9 57.3 55.7 41.9 55.0 51.6 31.8 | 52.3
""",
)

# Projectors without and with Vision Remember, on Qwen2-0.5B; the same columns.
TABLE_2 = _rows(
    2,
    COLUMNS,
    """
average pooling      | no  | | 57.8 1135.4 34.0 27.4 55.5 53.3 40.7 45.4 42.1 30.5 45.4 41.0 51.9 | 44.8
average pooling      | yes | | 58.5 1172.7 35.8 30.1 55.1 52.6 48.7 50.7 48.6 34.8 49.2 38.2 51.3 | 47.1
pixel shuffle        | no  | | 57.5 1174.2 33.1 29.8 54.4 51.5 37.3 42.2 40.2 29.5 44.6 39.2 50.7 | 43.7
pixel shuffle        | yes | | 58.9 1170.1 35.6 29.8 54.3 53.1 49.6 50.3 48.6 37.3 46.9 33.4 43.4 | 46.2
deformable attention | no  | | 57.1 1191.6 35.6 28.3 55.5 53.2 36.0 41.2 39.5 28.8 45.0 42.2 51.1 | 44.1
deformable attention | yes | | 59.1 1177.2 34.9 30.6 54.2 52.3 48.8 50.8 48.1 37.1 47.8 34.6 44.3 | 46.3
LDPv2                | no  | | 58.0 1179.0 35.6 30.4 53.8 53.8 41.9 46.3 43.7 31.5 43.9 37.1 28.0 | 43.3
LDPv2                | yes | | 58.9 1203.0 34.6 29.2 53.8 53.0 48.0 50.0 48.4 35.3 48.2 31.9 45.3 | 45.9
""",
)

# Representative models: GQA, MME-P, MMStar, MMMU, SQA-I, AI2D, ChartQA, DocVQA, TextVQA, RWQA
TABLE_3 = _rows(
    3,
    COLUMNS_TABLE_3,
    """
LLaVA-1.5      | no  | 7.2B | 62.0 1507.2 33.8 36.3 69.6 55.2 18.2 28.1 45.5 55.6 | 48.0
LLaVA-1.6      | no  | 7.1B | 64.2 1509.7 37.7 35.8 70.3 65.3 54.6 74.4 63.8 57.9 | 59.9
DeepSeek-VL    | no  | 7.3B | 61.2 1482.8 40.5 38.3 80.9 65.3 59.1 47.0 64.9 54.2 | 58.6
LLaVA-OV       | no  | 8.0B | 62.2 1579.7 61.8 49.4 95.9 81.1 80.0 90.2 84.5 66.3 | 75.0
MiniCPM-2.6    | no  | 8.1B | 56.4 1655.6 54.6 49.8 93.9 77.5 78.6 91.4 78.3 64.4 | 72.8
Qwen2-VL       | no  | 8.3B | 62.2 1686.1 57.2 50.6 84.6 80.0 81.6 95.0 86.4 67.2 | 74.9
Qwen-VL        | no  | 9.6B | 57.5 1549.0 34.5 37.0 68.8 63.0 65.7 66.3 63.1 49.3 | 58.3
DeepSeek-VL    | no  | 1.7B | 57.1 1306.6 39.9 33.8 68.4 51.5 47.4 42.2 57.8 49.7 | 51.3
MiniCPM-V-2    | no  | 2.8B | 54.3 1411.4 39.1 38.2 80.7 62.9 55.6 71.9 73.2 55.8 | 60.2
Phi-3-Vision   | no  | 4.2B | 64.9 1450.5 47.7 42.2 90.5 77.2 81.3 87.0 72.4 59.4 | 69.5
DeCo           | no  | 7.2B | 61.4 1448.5 33.1 35.6 69.6 56.0 15.2 23.6 40.7 48.7 | 45.6
TokenPacker    | no  | 7.3B | 62.1 1456.6 35.8 35.3 70.6 56.1 16.5 24.3 44.0 53.6 | 47.1
TokenPacker-HD | no  | 7.3B | 62.3 1489.8 37.5 36.1 69.9 65.9 54.3 60.2 68.0 55.3 | 58.4
LLaVA-VR       | yes | 0.9B | 55.3 1191.5 35.6 32.2 68.7 51.4 59.5 69.1 64.9 51.9 | 54.8
LLaVA-VR       | yes | 2.0B | 59.4 1339.0 43.1 35.4 81.0 63.1 68.3 79.2 70.0 57.5 | 62.4
""",
)

# Components, interactions, insertion layers, by group, in the order of GROUPS; Qwen2-0.5B, average pooling.
TABLE_4 = (
    _groups("4a", "baseline", "57.3 42.6 39.7 46.1", 44.8),
    _groups("4a", "vision resample", "57.7 44.0 40.4 45.2", 45.3),
    _groups("4a", "vision resample, several levels", "57.9 43.4 43.7 45.2", 46.1),
    _groups("4a", "vision resample, several levels, SELA", "58.6 43.4 45.7 46.2", 47.1),
    _groups("4b", "global attention", "49.5 41.8 20.2 43.4", 36.7),
    _groups("4b", "deformable attention", "57.9 43.4 43.7 45.2", 46.1),
    _groups("4b", "SELA", "58.6 43.4 45.7 46.2", 47.1),
    _groups("4c", "layer 1", "58.6 43.1 45.3 45.8", 46.8),
    _groups("4c", "layers 1, 4", "58.6 43.4 45.7 46.2", 47.1),
    _groups("4c", "layers 1, 4, 7", "57.6 42.5 44.2 45.2", 46.0),
)

TABLE_5A = (
    BudgetRow("no compression", 576, 47.5),
    BudgetRow("baseline", 144, 44.8),
    BudgetRow("Ours", 144, 47.1),
)

TABLE_5B = (
    TimeRow("Qwen2-1.5B", 576, False, 83.6),
    TimeRow("Qwen2-1.5B", 144, False, 48.5),
    TimeRow("Qwen2-1.5B", 144, True, 52.1),
    TimeRow("Qwen2-7B", 576, False, 233.3),
    TimeRow("Qwen2-7B", 144, False, 83.8),
    TimeRow("Qwen2-7B", 144, True, 88.8),
)
