"""Which samples a rank sees at a step: arithmetic on the global sample cursor, and the batches themselves.

A step takes the global samples `cursor .. cursor + global_batch - 1`. With D data-parallel ranks and
micro-batches of b rows, row i of micro-batch j on rank d is sample `cursor + j*D*b + d*b + i`. Every split of
a step over ranks and micro-batches therefore covers the same samples, and those of micro-batch j lie side by
side over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.dataset import TokenSplit
from trainer.data.order import Int64s, Order


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a step are spread over data-parallel ranks and micro-batches.

    Raises:
        ValueError: `global_batch` is not a multiple of `micro_batch x data_ranks`, or one of them is less
        than 1.
    """

    global_batch: int
    micro_batch: int
    data_ranks: int

    def __post_init__(self) -> None:
        if min(self.global_batch, self.micro_batch, self.data_ranks) < 1:
            raise ValueError(f"all sizes of a batch must be at least 1: {self}")
        if self.global_batch % (self.micro_batch * self.data_ranks):
            raise ValueError(
                f"global_batch ({self.global_batch}) must be a multiple of micro_batch x data_ranks "
                f"({self.micro_batch} x {self.data_ranks})"
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step and rank."""
        return self.global_batch // (self.micro_batch * self.data_ranks)

    def samples(self, cursor: int, data_rank: int) -> Int64s:
        """Global samples of `data_rank` in the step that begins at `cursor`: (micro_batches, micro_batch)."""
        if not 0 <= data_rank < self.data_ranks:
            raise ValueError(f"data_rank must be from 0 to {self.data_ranks - 1}, not {data_rank}")
        starts = cursor + self.micro_batch * (self.data_ranks * np.arange(self.micro_batches) + data_rank)
        return np.asarray(starts[:, None] + np.arange(self.micro_batch), dtype=np.int64)


class MicroBatches:
    """Reads one data-parallel rank's micro-batches of any step from a split, in the given order."""

    def __init__(self, split: TokenSplit, order: Order, plan: BatchPlan, data_rank: int) -> None:
        self._split = split
        self._order = order
        self._plan = plan
        self._data_rank = data_rank

    def step_batches(self, cursor: int) -> list[Int64s]:
        """The micro-batches of the step whose first global sample is `cursor`.

        Each has shape (micro_batch, sequence + 1): inputs are `[:, :-1]`, targets `[:, 1:]`.
        """
        windows = self._order.windows_of(self._plan.samples(cursor, self._data_rank))
        batches = np.empty((*windows.shape, self._split.sequence + 1), dtype=np.int64)
        for position in np.ndindex(windows.shape):
            self._split.read(int(windows[position]), batches[position])
        return list(batches)


def eval_cursors(windows: int, global_batch: int, eval_batches: int) -> range:
    """First samples of the global batches of one evaluation: the first `eval_batches`, or fewer where the
    split ends.

    Only whole batches count, so the ragged tail behind the last whole one is not evaluated. A split smaller
    than one global batch gives one batch all the same: in `PlainOrder` its windows repeat from the start
    until it is full.
    """
    return range(0, min(eval_batches, max(1, windows // global_batch)) * global_batch, global_batch)
