"""Zero-bubble schedules that fit themselves to costs and memory: `zb-1p`, `zb-2p`, `zb-auto`.

All are the heuristic of `zero_bubble_heuristic` with every combination of its choices, of which the fastest program
is kept (and of equally fast ones that with the lower peak). They differ in the memory that a rank may take: as much
as p micro-batches of its stage need (what 1f1b takes on rank 0), 2p (from which on the paper sees almost no bubble
left), or as much as is asked for. `zb-auto`, which is no row of the paper's tables, is never slower than what fits
into its limit of the others and of the handcrafted schedules; without a limit it takes 2p activations.

Source: "Zero Bubble Pipeline Parallelism" (arXiv:2401.10241), sections 3.1 and 4.2 (Table 5).
"""

from __future__ import annotations

from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request, register, require
from parallel.pipeline.schedules.zero_bubble import zb_h1, zb_h2
from parallel.pipeline.schedules.zero_bubble_heuristic import SLACK, Plan, least_memory, plan
from parallel.pipeline.simulate import peak_activations, simulate

_SOURCE = "Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 3.1"


@register("zb-1p", summary="fitted to the costs, in the memory of p activations a rank", source=_SOURCE)
def zb_1p(request: Request) -> Program:
    """The heuristic within the memory of 1f1b."""
    return to_program("zb-1p", request, plan(request.microbatches, request.costs, activations(request, request.ranks)))


@register("zb-2p", summary="fitted to the costs, in the memory of 2p activations a rank", source=_SOURCE)
def zb_2p(request: Request) -> Program:
    """The heuristic within twice the memory of 1f1b."""
    limits = activations(request, 2 * request.ranks)
    return to_program("zb-2p", request, plan(request.microbatches, request.costs, limits))


@register("zb-auto", summary="fitted to the costs and a memory limit (2p activations)", source=_SOURCE, limited=True)
def zb_auto(request: Request) -> Program:
    """The best within a limit."""
    return to_program("zb-auto", request, best_plan(request, limits_of(request)))


def best_plan(request: Request, limits: list[float]) -> Plan:
    """The best of the heuristic and the handcrafted schedules.

    The heuristic puts W's off as long as there is memory for them, mostly but not always to an advantage. So it
    also plans for the smaller limits of zb-1p and zb-2p.
    """
    found = [plan(request.microbatches, request.costs, limits)]
    tried = [limits]
    for count in (2 * request.ranks, request.ranks):
        smaller = [min(pair) for pair in zip(limits, activations(request, count), strict=True)]
        if smaller not in tried:
            found.append(plan(request.microbatches, request.costs, smaller))
            tried.append(smaller)
    for handcrafted in (zb_h1(request), zb_h2(request)):
        peaks = (peak_activations(handcrafted, rank, request.costs)[0] for rank in range(request.ranks))
        if all(peak <= limit * (1 + SLACK) for peak, limit in zip(peaks, limits, strict=True)):
            found.append(timed(handcrafted, request.costs))
    best = found[0]
    for other in found[1:]:
        if other.better_than(best):
            best = other
    return best


def timed(program: Program, costs: Costs) -> Plan:
    """A program of one stage a rank as a plan."""
    timeline = simulate(program, costs)
    span = max(timeline.span_seconds(rank) for rank in range(program.ranks))
    peak = max(peak_activations(program, rank, costs)[0] for rank in range(program.ranks))
    return Plan(program.actions, span, peak)


def limits_of(request: Request) -> list[float]:
    """What each rank may hold. Without a limit, 2p activations.

    Raises:
        ScheduleError: a limit that not even one micro-batch at a time keeps to.
    """
    limit = request.memory_limit
    if limit is None:
        return activations(request, 2 * request.ranks)
    stage = max(range(request.ranks), key=lambda stage: least_memory(stage, request.costs))
    least = least_memory(stage, request.costs)
    require(
        limit >= least,
        value=f"memory_limit={limit:.12g}",
        rule=f"one micro-batch alone takes {least:.12g} on rank {stage}",
        fix=f"set the limit to {least:.12g} or more",
    )
    return [limit] * request.ranks


def activations(request: Request, count: int) -> list[float]:
    """For each rank, the memory of that many activations of its stage."""
    return [count * least_memory(stage, request.costs) for stage in range(request.ranks)]


def to_program(name: str, request: Request, found: Plan) -> Program:
    """A plan as a program: stage r on rank r."""
    ranks = request.ranks
    return Program(name, ranks, ranks, request.microbatches, tuple(range(ranks)), found.actions)
