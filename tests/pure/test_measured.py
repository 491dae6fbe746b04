"""Costs from what the ranks measured, and whether a program is planned again with them."""

from __future__ import annotations

from launch.schedule_options import KEPT_FOR_W, costs_of
from parallel.pipeline.actions import Op
from parallel.pipeline.costs import Costs
from tests.support import make_run
from trainer.costs import derived_costs
from trainer.measured import (
    Measured,
    as_object,
    as_option,
    is_split,
    longest_span,
    measured_costs,
    planned_again,
    predicted_bubble_rate,
)
from trainer.program import build_program

DERIVED = Costs((1.0, 1.0), (3.0, 1.0), (1.0, 1.0), activation=(5.0, 7.0))


def of(passes: dict[tuple[Op, int], float], *transfers: float) -> Measured:
    return Measured(passes, transfers, ((2.0, 1.0),))


def test_the_costs_are_medians_over_the_ranks_that_run_a_part() -> None:
    halves = {(Op.I, 0): 5.0, (Op.W, 0): 6.0, (Op.I, 1): 7.0, (Op.W, 1): 8.0, (Op.F, 1): 9.0}
    ranks = [
        of({(Op.F, 0): 1.0} | halves, 0.25),
        of({(Op.F, 0): 2.0} | halves, 0.75),
        of({(Op.F, 0): 30.0} | halves),
    ]
    found = measured_costs(ranks, 2, DERIVED)
    assert found == Costs((2.0, 9.0), (5.0, 7.0), (6.0, 8.0), 0.5, activation=(5.0, 7.0))
    assert is_split(ranks)


def test_a_whole_backward_is_divided_as_the_sizes_say() -> None:
    ranks = [of({(Op.F, 0): 1.0, (Op.B, 0): 8.0}), of({(Op.F, 1): 1.0, (Op.B, 1): 8.0})]
    found = measured_costs(ranks, 2, DERIVED)
    assert found.input_gradient_seconds == (6.0, 4.0)
    assert found.weight_gradient_seconds == (2.0, 4.0)
    assert found.transfer_seconds == 0, "nobody has a neighbour"
    assert not is_split(ranks)
    nothing = Costs(1.0, 0.0, 0.0)
    assert measured_costs(ranks, 2, nothing).weight_gradient_seconds == (8.0, 8.0), "a part without a matrix product"


def test_a_part_that_ran_both_ways_is_taken_by_its_halves() -> None:
    passes = {(Op.F, 0): 1.0, (Op.B, 0): 100.0, (Op.I, 0): 5.0, (Op.W, 0): 6.0}
    found = measured_costs([of(passes)], 1, Costs())
    assert (found.input_gradient_seconds, found.weight_gradient_seconds) == ((5.0,), (6.0,))


def test_the_command_takes_them_as_they_are_written() -> None:
    """The times; what activations weigh is another option of it."""
    costs = Costs((0.5, 0.25), (0.125, 1e-7), (3.0, 4.0), 0.001, weight_activation=KEPT_FOR_W)
    assert costs_of(as_option(costs), None) == costs
    assert costs_of(as_object(costs)["option"], None) == costs


CASE = {
    "model.layers": 8,
    "train.global_batch": 8,
    "train.gradient_accumulation": 8,
    "parallel.pipeline": {"stages": 4, "schedule": "zb-auto"},
}


def test_a_program_is_planned_again_where_that_is_faster() -> None:
    run = make_run(4, CASE)
    program, derived = build_program(run), derived_costs(run)
    assert planned_again(run, program, derived) == program
    assert predicted_bubble_rate(run, program) == predicted_bubble_rate(run, program, derived)
    slow_end = Costs((1.0, 1.0, 1.0, 6.0), (1.0,) * 4, (1.0,) * 4, 0.5)
    again = planned_again(run, program, slow_end)
    assert longest_span(again, slow_end) < longest_span(program, slow_end)
    assert again.listed == program.listed
    assert again.placement == program.placement
    assert planned_again(run, again, slow_end) is again, "there is nothing more to gain"


def test_a_program_is_kept_where_the_schedule_would_be_slower() -> None:
    """The run's schedule is 1f1b; it happens to have a zero-bubble program."""
    program = build_program(make_run(4, CASE))
    run = make_run(4, {**CASE, "parallel.pipeline": {"stages": 4, "schedule": "1f1b"}})
    costs = Costs(1.0, 1.0, 1.0, 0.1)
    assert longest_span(build_program(run, costs), costs) > longest_span(program, costs)
    assert planned_again(run, program, costs) is program
