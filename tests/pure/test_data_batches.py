"""Which samples a rank sees: the same ones, in the same order, on every layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.batches import BatchPlan, MicroBatches, eval_cursors
from trainer.data.build import ensure_dataset
from trainer.data.config import DataConfig
from trainer.data.dataset import TokenSplit
from trainer.data.order import PlainOrder, ShuffledOrder

SIZES = st.integers(1, 6)


@given(micro_batches=SIZES, data_ranks=SIZES, micro_batch=SIZES, cursor=st.integers(0, 2**50))
def test_every_layout_covers_a_step_in_order(
    micro_batches: int, data_ranks: int, micro_batch: int, cursor: int
) -> None:
    plan = BatchPlan(micro_batches * data_ranks * micro_batch, micro_batch, data_ranks)
    assert plan.micro_batches == micro_batches
    of_rank = [plan.samples(cursor, rank) for rank in range(data_ranks)]
    assert {samples.shape for samples in of_rank} == {(micro_batches, micro_batch)}
    in_order = [
        of_rank[d][j, i] for j in range(micro_batches) for d in range(data_ranks) for i in range(micro_batch)
    ]
    assert in_order == list(range(cursor, cursor + plan.global_batch))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    directory = tmp_path_factory.mktemp("data")
    lines = [" ".join(str(number * step) for number in range(60)) for step in range(40)]
    (directory / "corpus.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    values = {
        "path": str(directory / "tokens"),
        "source": {"kind": "jsonl", "paths": [str(directory / "corpus.jsonl")]},
        "shard_tokens": 1000,
    }
    return ensure_dataset(DataConfig.model_validate(values)).split("train", sequence=16)


@given(
    data_ranks=st.sampled_from([1, 2, 3, 4, 6, 12]),
    micro_batch=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 5),
    step=st.integers(0, 40),
)
def test_every_layout_reads_the_same_tokens(
    split: TokenSplit, data_ranks: int, micro_batch: int, seed: int, step: int
) -> None:
    global_batch = 48
    order = ShuffledOrder(split.windows, seed)
    plan = BatchPlan(global_batch, micro_batch, data_ranks)
    cursor = step * global_batch
    of_rank = [MicroBatches(split, order, plan, rank).step_batches(cursor) for rank in range(data_ranks)]
    rows = [row for j in range(plan.micro_batches) for batches in of_rank for row in batches[j]]
    samples = order.windows_of(np.arange(cursor, cursor + global_batch))
    assert np.array_equal(rows, [split.sample(int(window)) for window in samples])


def test_batches_have_the_promised_shape_and_type(split: TokenSplit) -> None:
    batches = MicroBatches(split, PlainOrder(split.windows), BatchPlan(12, 3, 2), data_rank=1).step_batches(0)
    assert len(batches) == 2
    for batch in batches:
        assert (batch.shape, batch.dtype) == ((3, 17), np.int64)
        assert batch.flags.c_contiguous


def test_resuming_at_a_cursor_continues_the_same_stream(split: TokenSplit) -> None:
    batches = MicroBatches(split, ShuffledOrder(split.windows, 2), BatchPlan(6, 3, 1), data_rank=0)
    whole = [batches.step_batches(cursor) for cursor in range(0, 60, 6)]
    resumed = MicroBatches(split, ShuffledOrder(split.windows, 2), BatchPlan(6, 3, 1), data_rank=0)
    assert np.array_equal(resumed.step_batches(42), whole[7])


def test_evaluation_takes_whole_global_batches() -> None:
    assert list(eval_cursors(windows=100, global_batch=16, eval_batches=3)) == [0, 16, 32]
    assert list(eval_cursors(windows=100, global_batch=16, eval_batches=50)) == [0, 16, 32, 48, 64, 80]
    assert list(eval_cursors(windows=100, global_batch=16, eval_batches=0)) == []


def test_a_small_evaluation_split_repeats_to_fill_one_batch(split: TokenSplit) -> None:
    assert list(eval_cursors(windows=3, global_batch=8, eval_batches=5)) == [0]
    (batch,) = MicroBatches(split, PlainOrder(3), BatchPlan(8, 8, 1), data_rank=0).step_batches(0)
    assert np.array_equal(batch, [split.sample(window) for window in (0, 1, 2, 0, 1, 2, 0, 1)])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 4, 1), r"global_batch \(10\) must be a multiple of micro_batch x data_ranks \(4 x 1\)"),
        ((8, 4, 4), r"global_batch \(8\) must be a multiple of micro_batch x data_ranks \(4 x 4\)"),
        ((8, 0, 1), "at least 1"),
    ],
)
def test_a_plan_must_divide(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(*sizes)


def test_there_is_no_rank_beyond_the_plan() -> None:
    with pytest.raises(ValueError, match="data_rank must be from 0 to 1, not 2"):
        BatchPlan(8, 4, 2).samples(0, 2)
