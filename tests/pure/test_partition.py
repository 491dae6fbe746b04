"""The cut of a chain of units into stages: optimal against every possible cut, and what it means for a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.partition import partition_by_cost
from trainer.models.config import ModelConfig
from trainer.models.partition import stage_units, unit_flops, unit_names, unit_parameters


def every_cut(count: int, stages: int) -> Iterator[tuple[range, ...]]:
    for borders in combinations(range(1, count), stages - 1):
        edges = (0, *borders, count)
        yield tuple(range(start, stop) for start, stop in pairwise(edges))


def loads(costs: Sequence[float], parts: Sequence[range]) -> list[float]:
    return [sum(costs[index] for index in part) for part in parts]


def brute_force(costs: Sequence[float], stages: int) -> list[int]:
    """Ends of the parts: the first border as late as an optimal cut allows, the rest cut by the same rule."""
    if stages == 1:
        return [len(costs)]
    best = min(max(loads(costs, cut)) for cut in every_cut(len(costs), stages))
    end = max(cut[0].stop for cut in every_cut(len(costs), stages) if max(loads(costs, cut)) == best)
    return [end, *(end + stop for stop in brute_force(costs[end:], stages - 1))]


@given(st.data())
def test_no_cut_is_better(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 9).map(float), min_size=1, max_size=9))
    stages = data.draw(st.integers(1, len(costs)))
    parts = partition_by_cost(costs, stages)
    assert [index for part in parts for index in part] == list(range(len(costs)))
    assert len(parts) == stages
    assert all(parts)
    assert max(loads(costs, parts)) == min(max(loads(costs, cut)) for cut in every_cut(len(costs), stages))
    assert [part.stop for part in parts] == brute_force(costs, stages)


@pytest.mark.parametrize(("count", "stages"), [(3, 4), (3, 0), (0, 1)])
def test_stages_need_units(count: int, stages: int) -> None:
    with pytest.raises(ValueError, match=f"{count} units cannot be cut into {stages} non-empty stages"):
        partition_by_cost([1.0] * count, stages)


def model(**fields: object) -> ModelConfig:
    return ModelConfig.model_validate({"vocab": 128, "hidden": 64, "layers": 4, "heads": 4, **fields})


@given(layers=st.integers(1, 9), stages=st.integers(1, 9), vocab=st.sampled_from([2, 128, 10**6]), tied=st.booleans())
def test_every_unit_of_a_decoder_is_in_one_stage(layers: int, stages: int, vocab: int, tied: bool) -> None:
    config = model(layers=layers, vocab=vocab, tied_embeddings=tied)
    stages = min(stages, layers)
    units = stage_units(config, 32, stages)
    assert tuple(name for stage in units for name in stage) == unit_names(config)
    assert all(units)


def test_a_heavy_head_takes_blocks_off_the_last_stage() -> None:
    light, heavy = (stage_units(model(layers=8, vocab=vocab), 32, 2) for vocab in (2, 4096))
    assert len(light[1]) > len(heavy[1])


def test_the_partition_that_was_asked_for() -> None:
    units = stage_units(model(), 32, 3, (1, 2, 1))
    assert units == (("embed", "blocks.0"), ("blocks.1", "blocks.2"), ("blocks.3", "head"))


def test_parameters_and_flops_written_out() -> None:
    """hidden 64, heads 4 of dimension 16, 2 key/value heads, feed-forward 96, vocabulary 128, sequence 32."""
    config = model(layers=1, kv_heads=2, ffn_hidden=96)
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert unit_parameters(config) == {"embed": 128 * 64, "blocks.0": block, "head": 128 * 64}
    # Causal attention: 6 = 12 / 2 per token, position and channel.
    assert unit_flops(config, 32) == {"embed": 0.0, "blocks.0": 6.0 * block + 6 * 32 * 64, "head": 6.0 * 128 * 64}
    gelu = model(layers=1, ffn_hidden=96, activation="gelu", tied_embeddings=True)
    assert unit_parameters(gelu) == {"embed": 128 * 64, "blocks.0": 4 * 64 * 64 + 2 * 64 * 96, "head": 0}
    assert unit_flops(gelu, 32)["head"] == 6.0 * 128 * 64
