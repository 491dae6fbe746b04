"""`zb-ilp`: the best order of F, I and W for given costs and memory, by integer programming with HiGHS.

The search starts from the best plan that is known without it (`zero_bubble_auto`), which is also its answer where it
finds nothing better in its time. It does not start at all if that plan meets a lower bound, or if the model is too
large. Whatever ends it, `Search` says how far the answer can be from the best.

Source: "Zero Bubble Pipeline Parallelism" (arXiv:2401.10241), appendix G; the model is in `zero_bubble_model`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request, register
from parallel.pipeline.schedules.zero_bubble_auto import best_plan, limits_of, timed, to_program
from parallel.pipeline.schedules.zero_bubble_heuristic import SLACK, Plan
from parallel.pipeline.schedules.zero_bubble_model import Model, lower_bound
from parallel.pipeline.simulate import peak_activations, simulate

MOST_BINARIES = 20_000
"""Of larger models HiGHS does not come past the first relaxation within a minute (measured: p=8, m=64 with 17479 and
p=16, m=48 with 42023 binaries; two AMD EPYC cores, November 2026)."""


@dataclass(frozen=True, slots=True)
class Search:
    """How a search went.

    Attributes:
        objective_seconds: the span of the slowest rank in the program that was found.
        bound_seconds: no program has a shorter one.
        gap: (objective - bound) / objective.
        status: why it ended.
        seconds: how long it took.
    """

    objective_seconds: float
    bound_seconds: float
    gap: float
    status: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.status}, gap {self.gap:.2%}, {self.seconds:.1f} s"


def solve(request: Request) -> tuple[Program, Search]:
    """The best program found within `request.time_limit_seconds`, and how the search went.

    Raises:
        ScheduleError: a limit that not even one micro-batch at a time keeps to.
    """
    began = time.monotonic()
    limits = limits_of(request)
    best = best_plan(request, limits)
    bound = lower_bound(request.microbatches, request.costs, limits)
    status = "optimal"
    if best.span_seconds > bound * (1 + SLACK):
        outcome = _search(request, limits, best, bound, began + request.time_limit_seconds)
        bound, status = max(bound, min(outcome.bound_seconds, best.span_seconds)), outcome.status
        if outcome.plan is not None and outcome.plan.better_than(best):
            best = outcome.plan
    bound = min(bound, best.span_seconds)
    gap = 1 - bound / best.span_seconds if best.span_seconds else 0.0
    search = Search(best.span_seconds, bound, gap, status, time.monotonic() - began)
    return to_program("zb-ilp", request, best), search


def report(request: Request) -> tuple[Program, str]:
    """As `solve`, with the search in words."""
    program, search = solve(request)
    return program, f"zb-ilp: {search}"


@register(
    "zb-ilp",
    summary="the best order for the costs and a memory limit (2p activations), as far as the time limit allows",
    source="Zero Bubble Pipeline Parallelism, arXiv:2401.10241, appendix G",
    limited=True,
    report=report,
)
def zb_ilp(request: Request) -> Program:
    """Heuristic, then integer programming."""
    return solve(request)[0]


class _Outcome(NamedTuple):
    """What a solver says."""

    plan: Plan | None
    bound_seconds: float
    status: str


def _search(request: Request, limits: Sequence[float], known: Plan, bound: float, deadline: float) -> _Outcome:
    model = Model(request.microbatches, request.costs, limits, known.span_seconds, bound)
    binaries = len(model.binary)
    if binaries > MOST_BINARIES:
        return _Outcome(None, bound, f"not searched, {binaries} binaries are more than {MOST_BINARIES}")
    model.build()
    start = _columns(request, model, known)
    values, least, status = _highs(model, start, max(deadline - time.monotonic(), 0.0))
    if values is None:
        return _Outcome(None, bound, status)
    program = to_program("zb-ilp", request, known).with_actions(model.orders(values))
    return _Outcome(_kept(request, limits, program), least * model.unit_seconds, status)


def _columns(request: Request, model: Model, known: Plan) -> list[float]:
    timeline = simulate(to_program("zb-ilp", request, known), request.costs)
    ends = {span.action: span.end for listed in timeline.spans for span in listed}
    return model.solution(known.actions, ends, known.span_seconds)


def _kept(request: Request, limits: Sequence[float], program: Program) -> Plan | None:
    """The program as a plan. None if it breaks a rule, which the solver's tolerances and passes of no length allow."""
    if simulate(program, request.costs).blocked:
        return None
    peaks = (peak_activations(program, rank, request.costs)[0] for rank in range(request.ranks))
    kept = all(peak <= limit * (1 + SLACK) for peak, limit in zip(peaks, limits, strict=True))
    return timed(program, request.costs) if kept else None


def _highs(model: Model, start: Sequence[float], seconds: float) -> tuple[list[float] | None, float, str]:
    """Columns of the best solution if there is one, the least that T can be, and why HiGHS ended."""
    import highspy  # here, because every command imports the schedules and few need a solver
    import numpy as np

    rows = model.rows
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(rows.whole), len(rows.lower)
    cost = np.zeros(len(rows.whole))
    cost[model.total] = 1.0
    lp.col_cost_ = cost
    lp.col_lower_, lp.col_upper_ = np.array(rows.column_lower), np.array(rows.column_upper)
    lp.row_lower_, lp.row_upper_ = np.array(rows.lower), np.full(len(rows.lower), highspy.kHighsInf)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.array(rows.start)
    lp.a_matrix_.index_ = np.array(rows.index)
    lp.a_matrix_.value_ = np.array(rows.value)
    kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
    lp.integrality_ = [kinds[whole] for whole in rows.whole]
    solver = highspy._core._Highs()  # highspy.Highs prints a line before one can ask it not to
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("time_limit", seconds)
    solver.setOptionValue("mip_rel_gap", 1e-6)
    solver.passModel(lp)
    known = highspy.HighsSolution()
    known.col_value = list(start)
    solver.setSolution(known)
    solver.run()
    info, ended = solver.getInfo(), solver.getModelStatus()
    least = info.mip_dual_bound
    if not model.binary:  # all is decided, a linear program is left
        least = info.objective_function_value if ended == highspy.HighsModelStatus.kOptimal else -np.inf
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    values = list(solver.getSolution().col_value) if found else None
    return values, least, solver.modelStatusToString(ended).lower()
