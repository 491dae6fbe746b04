"""The global gradient norm, summed in one order whatever the way it takes.

First over the ranks of a pipeline position (tensor, data_shard), in rank order; then over pipeline positions, first to
last. The second sum may be made by everybody at once, or along the pipeline, rank by rank
(trainer/optim/post_validation.py): the additions are the same, in fp64, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from parallel.comm.channel import Channel, Pending
from parallel.flat.space import Range, Slot
from parallel.zero.optimizer import ShardedOptimizer


class GradientNorm:
    """Sums of squares of the reduced gradients.

    Args:
        counted: Per unit the ranges that this rank counts (`counted_ranges`).
        position: The ranks of this pipeline position among which the counted ranges are spread.
        pipeline: The pipeline axis.
    """

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        counted: Mapping[str, list[Range]],
        position: Channel,
        pipeline: Channel,
    ) -> None:
        self.optimizer, self.counted, self.position, self.pipeline = optimizer, dict(counted), position, pipeline

    def own(self) -> Tensor:
        """Of this pipeline position, fp64, shape ()."""
        return _sum_over(self.position, self.optimizer.norm_squared(self.counted))

    def total(self) -> Tensor:
        """Of the model, fp64, shape ()."""
        return _sum_over(self.pipeline, self.own())


def _sum_over(channel: Channel, value: Tensor) -> Tensor:
    """The sum of every rank's value, in rank order."""
    table = value.new_empty(channel.size)
    table[channel.index] = value
    Pending(channel.all_gather(table)).finish()
    total = table[0]
    for other in table[1:]:
        total = total + other
    return total


def counted_ranges(slots: Sequence[Slot], tensor_index: int) -> list[Range]:
    """The ranges of a unit that this rank counts in the global norm.

    Weights that every tensor rank holds whole are counted by the first; copies of tied weights are not counted.
    Neighbouring slots are joined, padding between them (zeros) included.
    """
    ranges: list[Range] = []
    joinable = False
    for slot in slots:
        counts = slot.spec.tied_to is None and (slot.spec.shard_dim is not None or tensor_index == 0)
        if counts and joinable:
            ranges[-1] = Range(ranges[-1].start, slot.range.stop)
        elif counts:
            ranges.append(slot.range)
        joinable = counts
    return ranges
