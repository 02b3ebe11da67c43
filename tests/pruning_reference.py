"""The algorithms once more: one token after the other, in float64, as the papers and their code describe them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Select = Callable[[Tensor, Tensor, Tensor], tuple[list[int], dict[int, Tensor]]]


def top(scores: Tensor, members: Tensor, count: int) -> list[int]:
    """The members with the highest scores, one after the other."""
    left = members.tolist()
    stay: list[int] = []
    for _ in range(count):
        best = max(left, key=lambda place: float(scores[place]))
        left.remove(best)
        stay.append(best)
    return stay


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors."""
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def vision_zip(dominant: int, contextual: int) -> Select:
    """VisionZip for one tile."""

    def select(attention: Tensor, keys: Tensor, features: Tensor) -> tuple[list[int], dict[int, Tensor]]:
        stay = top(attention, torch.arange(len(attention)), dominant)
        rest = [place for place in range(len(attention)) if place not in stay]
        step = max(1, len(rest) // contextual)
        targets = rest[::step][:contextual]
        members: dict[int, list[int]] = {target: [] for target in targets}
        metric = keys.double().mean(1)
        for place in rest:
            if place not in targets:
                members[max(targets, key=lambda target: cosine(metric[place], metric[target]))].append(place)
        changed = {}
        for target, others in members.items():
            changed[target] = features[target].double()
            if others:
                changed[target] = changed[target] + torch.stack([features[o].double() for o in others]).mean(0)
        return [*stay, *targets], changed

    return select


def prumerge(neighbours: int, *, spread: bool) -> Select:
    """PruMerge for one tile, or PruMerge+."""

    def select(attention: Tensor, keys: Tensor, features: Tensor) -> tuple[list[int], dict[int, Tensor]]:
        scores, count = attention.double(), len(attention)
        ordered = scores.sort().values
        low, high = (_quantile(ordered, share) for share in (0.25, 0.75))
        number = max(1, sum(float(score) > high + 1.5 * (high - low) for score in scores))
        stay = top(scores, torch.arange(count), number)
        if spread:
            stay += [place for place in range(0, count, max(1, int(1 / (number / count) / 3))) if place not in stay]
        changed = {}
        for place in stay:
            others = [other for other in range(count) if other != place]
            others.sort(key=lambda other: -cosine(keys[place].flatten(), keys[other].flatten()))
            changed[place] = features[place].double()
            for other in others[:neighbours]:
                changed[place] = changed[place] + scores[other] * features[other].double()
        dropped = [place for place in range(count) if place not in stay]
        if dropped:
            place = max(dropped, key=lambda other: float(scores[other]))
            changed[place] = sum((scores[other] * features[other].double() for other in dropped), torch.zeros(()))
            stay = [*stay, place]
        return stay, changed

    return select


def _quantile(ordered: Tensor, share: float) -> float:
    """Of sorted values, between neighbours by straight lines."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (place - below))


def sparse_raters(embeddings: Tensor, vision: list[int], words: list[int]) -> list[int]:
    """The words whose likeness to the vision tokens is above average."""
    likeness = torch.zeros(len(words), dtype=torch.float64)
    for place in vision:
        likeness += (embeddings[words].double() @ embeddings[place].double()).softmax(0) / len(vision)
    return [word for word, value in zip(words, likeness, strict=True) if value > likeness.mean()]


def density_peaks(states: Tensor, count: int, neighbours: int = 5) -> tuple[list[int], list[int]]:
    """Centres, and for each state the number of its centre."""
    states, total = states.double(), len(states)
    distance = [[float((a - b).norm()) / states.shape[1] ** 0.5 for b in states] for a in states]
    density = []
    for own in distance:
        near = sorted(own)[:neighbours]
        density.append(float(torch.exp(-torch.tensor([d * d for d in near]).mean())))
    furthest = max(max(own) for own in distance)
    peaks = []
    for i in range(total):
        apart = [distance[i][j] for j in range(total) if density[j] > density[i]]
        peaks.append((min(apart) if apart else furthest) * density[i])
    centres = sorted(range(total), key=lambda i: -peaks[i])[:count]
    nearest = [min(range(count), key=lambda c: distance[i][centres[c]]) for i in range(total)]
    for number, centre in enumerate(centres):
        nearest[centre] = number
    return centres, nearest


def tome(states: Tensor, metric: Tensor, groups: list[list[int]], count: int) -> tuple[Tensor, list[list[int]]]:
    """One merge of ToMe: the CLS token in front is left alone. ``groups`` are the first tokens in each."""
    left = list(range(0, len(states), 2))[1:]
    right = list(range(1, len(states), 2))
    edges = []
    for a in left:
        b = max(right, key=lambda other: cosine(metric[a], metric[other]))
        edges.append((cosine(metric[a], metric[b]), a, b))
    edges.sort(key=lambda edge: -edge[0])
    rows = {place: states[place].double() * len(groups[place]) for place in range(len(states))}
    joined = {place: list(group) for place, group in enumerate(groups)}
    for _, a, b in edges[:count]:
        rows[b] = rows[b] + rows.pop(a)
        joined[b] = joined[b] + joined.pop(a)
    places = sorted(rows)
    return torch.stack([rows[place] / len(joined[place]) for place in places]), [joined[place] for place in places]
