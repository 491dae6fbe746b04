"""Place sends and receives where consecutive stages are on different ranks.

A send stands right behind its producer. Where the receive stands decides between deadlock and idle time.
Every rank has one p2p lane and works it off in order, so if two neighbours exchange and both list their send
first, neither send meets its receive. The cure is one order for the whole pipeline: transfers are sorted by
the end of their producer in a simulation (ties: by the simulation's order, which respects all dependencies),
and every rank lists its ends of transfers in that order. Taking the transfers one by one in that order always
works, whether sends are buffered or rendezvous; hence no lane ever gets stuck.

Within that order a receive is listed before the last action that the receiving rank starts before the data is
sent: it is open when the data comes, and the transfer hides behind that action. Earlier would be free of
deadlock too, but each open receive holds a buffer; directly before the consumer would make the sender wait.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from parallel.pipeline.actions import PASS_OPS, TRANSFER_OPS, Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program, refuse
from parallel.pipeline.rules import receive_of
from parallel.pipeline.simulate import Timeline, simulate
from parallel.pipeline.verify import check


class _Transfer(NamedTuple):
    """What a producer sends on. The first two fields are the place in the order of all transfers."""

    end: float  # when the producer ends, in seconds
    place: int  # of the producer in the simulation's order
    rank: int
    producer: Action
    send: Action


def pair_transfers(program: Program, costs: Costs | None = None, *, late: bool = False) -> Program:
    """The program with SEND and RECV for every output and gradient that crosses from rank to rank.

    Args:
        program: without transfers.
        costs: decide which of two transfers is listed first; unit costs if None. Under any costs the program
            is free of deadlock.
        late: list a receive right before the pass that needs it, for transfers that have no lane of their own
            (`Sends.BLOCKING`); sends must then be buffered.

    Raises:
        ValueError: the program already has transfers, or per-stage costs are for another number of stages.
        ProgramError: the program does not come to its end.
    """
    refuse(program, TRANSFER_OPS, "pair_transfers")
    timeline = simulate(program, costs)
    if timeline.blocked:
        check(program)
    work = [[span for span in listed if span.action.op in PASS_OPS] for listed in timeline.spans]
    numbers = [{span.action: number for number, span in enumerate(listed)} for listed in work]
    starts = [[span.start for span in listed] for listed in work]
    # gaps[rank][n]: what the p2p lane gets between passes n-1 and n of the rank, in order.
    gaps: list[list[list[Action]]] = [[[] for _ in range(len(listed) + 1)] for listed in work]
    newest = [0] * program.ranks  # the gap of the last transfer so far; none may be placed before it now
    for transfer in _in_order(program, timeline):
        if late:
            meeting = receive_of(transfer.send, program)
            assert meeting is not None, "a boundary between ranks has a stage on either side"
            gaps[transfer.rank][numbers[transfer.rank][transfer.producer] + 1].insert(0, transfer.send)
            consumer = numbers[meeting.rank][_consumer(meeting.action, numbers[meeting.rank])]
            gaps[meeting.rank][consumer].append(meeting.action)
            continue
        newest[transfer.rank] = numbers[transfer.rank][transfer.producer] + 1
        gaps[transfer.rank][newest[transfer.rank]].append(transfer.send)
        meeting = receive_of(transfer.send, program)
        assert meeting is not None, "a boundary between ranks has a stage on either side"
        under_way = bisect_left(starts[meeting.rank], transfer.end) - 1
        newest[meeting.rank] = max(newest[meeting.rank], under_way)
        gaps[meeting.rank][newest[meeting.rank]].append(meeting.action)
    return program.with_actions(map(_woven, program.actions, gaps))


def _in_order(program: Program, timeline: Timeline) -> list[_Transfer]:
    """All transfers, sorted so that each comes behind everything its producer depends on."""
    transfers: list[_Transfer] = []
    for place, span in enumerate(timeline.order):
        action = span.action
        if action.op is Op.F and program.crossings[action.stage]:
            send = Action(Op.SEND_F, action.stage, action.microbatch)
        elif (
            action.op in (Op.B, Op.I)
            and (before := program.before(action.stage)) is not None
            and program.crossings[before]
        ):
            send = Action(Op.SEND_I, action.stage, action.microbatch)
        else:
            continue
        transfers.append(_Transfer(span.end, place, span.rank, action, send))
    return sorted(transfers, key=lambda transfer: (transfer.end, transfer.place))


def _consumer(receive: Action, listed: Mapping[Action, int]) -> Action:
    """The pass that reads what a receive brings."""
    ops = (Op.F,) if receive.op is Op.RECV_F else (Op.B, Op.I)
    passes = (Action(op, receive.stage, receive.microbatch) for op in ops)
    return next(action for action in passes if action in listed)


def _woven(listed: Sequence[Action], gaps: Sequence[Sequence[Action]]) -> Iterator[Action]:
    """The actions of a rank with the transfers of each gap right behind the pass that opens the gap."""
    yield from gaps[0]
    following = iter(gaps[1:])
    for action in listed:
        yield action
        if action.op in PASS_OPS:
            yield from next(following)
