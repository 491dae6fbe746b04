"""Which units each stage gets: contiguous, and as even as the units' costs allow. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence


def partition_by_cost(costs: Sequence[float], stages: int) -> tuple[range, ...]:
    """Cut a chain of `costs` into `stages` contiguous, non-empty parts whose largest sum is the smallest possible.

    Of several optimal cuts the one whose later stages are lightest is taken: the last stages hold the logits,
    whose memory the costs do not know.

    Raises:
        ValueError: fewer units than stages.
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} units cannot be cut into {stages} non-empty stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[k][i]: the smallest possible largest sum of the units i.. cut into k parts.
    best = [[float("inf")] * (count + 1) for _ in range(stages + 1)]
    cut = [[count] * (count + 1) for _ in range(stages + 1)]
    best[0][count] = 0.0
    for parts in range(1, stages + 1):
        for start in range(count):
            for end in range(start + 1, count + 1):
                worst = max(total[end] - total[start], best[parts - 1][end])
                if worst <= best[parts][start]:
                    best[parts][start], cut[parts][start] = worst, end
    ranges, start = [], 0
    for parts in range(stages, 0, -1):
        end = cut[parts][start]
        ranges.append(range(start, end))
        start = end
    return tuple(ranges)
