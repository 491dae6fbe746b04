"""The simulator against formulas, published figures and deadlocks. For any program: test_pipeline_random."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Lane, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import generate
from parallel.pipeline.simulate import Sends, peak_activations, simulate

RANKS = st.integers(1, 8)
MICROBATCHES = st.integers(1, 20)


@given(st.sampled_from(["gpipe", "1f1b"]), RANKS, MICROBATCHES)
def test_bubble_rate_is_the_formula(name: str, p: int, m: int) -> None:
    timeline = simulate(generate(name, p, m))  # F = 1, B = 2
    assert timeline.makespan_seconds == 3 * (m + p - 1)
    assert timeline.bubble_rate == pytest.approx((p - 1) / (m + p - 1))
    assert timeline.busy_seconds(p - 1) == 3 * m


@given(RANKS, MICROBATCHES)
def test_peak_activations(p: int, m: int) -> None:
    assert simulate(generate("gpipe", p, m)).peak_activations == (m,) * p
    assert simulate(generate("1f1b", p, m)).peak_activations == tuple(min(p - r, m) for r in range(p))


# Zero-bubble paper (arXiv:2401.10241v1): milliseconds of Table 9, 1F1B's bubble rates of Table 5.
@pytest.mark.parametrize(
    ("p", "m", "forward", "inputs", "weights", "transfer", "published"),
    [
        (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431),
        (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985),
        (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240),
        (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552),
    ],
)
def test_published_bubble_rates(
    p: int, m: int, forward: float, inputs: float, weights: float, transfer: float, published: float
) -> None:
    costs = Costs(forward, inputs, weights, transfer)
    program = generate("1f1b", p, m)
    assert round(simulate(program, costs).bubble_rate, 4) == published
    assert round(simulate(pair_transfers(program), costs).bubble_rate, 4) == published


def test_deferred_weight_gradients_keep_activations_alive() -> None:
    program = Program.from_csv("0F0,0I0,0F1,0I1,0W0,0W1")
    assert peak_activations(program, 0) == (2, Action(Op.F, 0, 1))


def test_per_stage_costs() -> None:
    costs = Costs(forward_seconds=(1.0, 3.0), input_gradient_seconds=2.0, weight_gradient_seconds=(0.5, 0.0))
    timeline = simulate(generate("gpipe", 2, 1), costs)
    assert [(str(span.action), span.start, span.end) for listed in timeline.spans for span in listed] == [
        ("0F0", 0.0, 1.0),
        ("0B0", 6.0, 8.5),
        ("1F0", 1.0, 4.0),
        ("1B0", 4.0, 6.0),
    ]
    with pytest.raises(ValueError, match="forward_seconds lists 2 stages, the model has 3"):
        simulate(generate("gpipe", 3, 1), costs)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), (), (1.0, -0.5)])
def test_impossible_costs_are_refused(value: float | tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"weight_gradient_seconds=.* must be finite and not negative"):
        Costs(weight_gradient_seconds=value)


def test_lanes_run_beside_each_other() -> None:
    program = add_update(add_reduce(generate("1f1b", 1, 2), per_microbatch=True))
    timeline = simulate(program, Costs(reduce_seconds=5.0, update_seconds=0.5))
    spans = {str(span.action): (span.lane, span.start, span.end) for span in timeline.spans[0]}
    assert spans["0F1"] == (Lane.COMPUTE, 3.0, 4.0)
    assert spans["0REDUCE0"] == (Lane.DP_COMM, 3.0, 8.0)  # beside F and B of micro-batch 1
    assert spans["0REDUCE1"] == (Lane.DP_COMM, 8.0, 13.0)  # in order behind REDUCE0
    assert spans["0UPDATE"] == (Lane.COMPUTE, 13.0, 13.5)
    assert timeline.makespan_seconds == 13.5
    assert timeline.bubble_rate == 0  # waiting for the reduction is no pipeline bubble


def test_what_transfers_do_to_their_lane() -> None:
    # Rank 1 is slow to come to its receives: both F come first.
    program = Program.from_csv(
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_I0,0B0,0RECV_I1,0B1\n"
        "1RECV_F0,1F0,1RECV_F1,1F1,1B0,1SEND_I0,1B1,1SEND_I1"
    )
    costs = Costs(transfer_seconds=2.0)

    def span(sends: Sends, text: str) -> tuple[float, float]:
        timeline = simulate(program, costs, sends=sends)
        return next((s.start, s.end) for s in timeline.order if str(s.action) == text)

    assert span(Sends.LATENCY, "1RECV_F1") == (2.0, 4.0)
    assert span(Sends.BUFFERED, "1RECV_F1") == (3.0, 5.0)  # the lane is busy with RECV_F0 until then
    assert span(Sends.RENDEZVOUS, "1RECV_F1") == (3.0, 5.0)
    assert span(Sends.BUFFERED, "0SEND_F1") == (2.0, 2.0)
    assert span(Sends.RENDEZVOUS, "0SEND_F1") == (3.0, 5.0)  # one event with its receive


def test_a_circle_is_a_deadlock() -> None:
    program = Program.from_csv("0F0,0B0\n1B0,1F0")
    timeline = simulate(program)
    assert [str(stuck) for stuck in timeline.blocked] == [
        "rank 0, lane compute: 0B0 waits for 1B0 on rank 1 (the stage after has its input gradient)",
        "rank 1, lane compute: 1B0 waits for 1F0 on rank 1 (its forward has run)",
    ]
    assert [str(span.action) for span in timeline.order] == ["0F0"]
    with pytest.raises(ValueError, match="never ends: rank 0, lane compute: 0B0 waits for 1B0"):
        _ = timeline.makespan_seconds
    with pytest.raises(ValueError, match="never ends"):
        _ = timeline.bubble_rate


def test_waiting_for_what_nobody_lists_is_a_deadlock() -> None:
    program = Program.from_csv("0F0,0RECV_I0,0B0\n1RECV_F0,1F0,1B0,1SEND_I0")
    first, _ = (str(stuck) for stuck in simulate(program).blocked if stuck.rank == 1)
    assert first == (
        "rank 1, lane p2p: 1RECV_F0 waits for 0SEND_F0 on rank 0 "
        "(the stage before has sent; rank 0 does not list it)"
    )


def test_both_neighbours_sending_first_is_a_deadlock_only_for_rendezvous() -> None:
    program = Program.from_csv(
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_I0,0B0,0RECV_I1,0B1\n"
        "1RECV_F0,1F0,1B0,1SEND_I0,1RECV_F1,1F1,1B1,1SEND_I1"
    )
    assert not simulate(program, sends=Sends.BUFFERED).blocked
    stuck = {str(stuck.action): str(stuck) for stuck in simulate(program, sends=Sends.RENDEZVOUS).blocked}
    assert "1RECV_F1 on rank 1 (the receiver is ready; 1SEND_I0 is before it)" in stuck["0SEND_F1"]
    assert "0RECV_I0 on rank 0 (the receiver is ready; 0SEND_F1 is before it)" in stuck["1SEND_I0"]


def test_large_programs_are_simulated_at_once() -> None:
    program = pair_transfers(generate("1f1b", 32, 256))
    began = time.process_time()
    simulate(program)
    assert time.process_time() - began < 3  # 0.4 s on a quiet core; anything quadratic takes minutes
