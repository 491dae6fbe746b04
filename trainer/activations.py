"""How a program's copies of activations are carried out: the store of `offload`, told when by the program.

A copy to the host gives its memory back when it is finished. In the simulation that is a moment; here it is a place
in the program, the same in every run: the rank waits for the copy before the first action that takes new memory (a
forward, or a RELOAD) and that starts, in the simulation, when the copy has ended or later. Where copies are as fast as
was planned nobody waits, and where they are slower the rank does, instead of taking more memory than was planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from offload.activations import ActivationStore
from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.executor import Handler
from parallel.pipeline.program import Program
from parallel.pipeline.simulate import simulate
from trainer.config.run import ResolvedRun

_SLACK = 1e-9
"""Of the makespan: what rounding may add to times that are equal."""


def finishes(program: Program, rank: int, costs: Costs) -> dict[Action, list[Action]]:
    """For actions of a rank, the OFFLOADs that must be over before them; see the module's docstring."""
    timeline = simulate(program, costs)
    spans, slack = timeline.spans[rank], _SLACK * timeline.makespan_seconds
    due: dict[Action, list[Action]] = {}
    for place, copy in enumerate(spans):
        if copy.action.op is not Op.OFFLOAD:
            continue
        for span in spans[place + 1 :]:
            if span.action.op in (Op.F, Op.RELOAD) and span.start >= copy.end - slack:
                due.setdefault(span.action, []).append(copy.action)
                break
    return due


class ActivationCopies:
    """The keeper of the forwards of a rank, and the handlers of OFFLOAD and RELOAD.

    Args:
        store: Holds the rank's activations.
        rank: Its pipeline rank.
    """

    def __init__(self, store: ActivationStore, rank: int) -> None:
        self.store, self.rank = store, rank
        self.handlers: dict[Op, Handler] = {Op.OFFLOAD: self.offload, Op.RELOAD: self.reload}
        self._due: Mapping[Action, list[Action]] = {}

    def plan(self, program: Program, costs: Costs) -> None:
        """Carry out the copies of `program`, which were placed with these costs, from the next step on."""
        moved = [_of(action) for action in program.actions[self.rank] if action.op is Op.OFFLOAD]
        self.store.offloaded = frozenset(moved)
        self._due = finishes(program, self.rank, costs) if moved else {}

    def keeper(self, stage: int, microbatch: int) -> AbstractContextManager[Any]:
        """What stands around the forward of a micro-batch on a stage."""
        self._finish_before(Action(Op.F, stage, microbatch))
        return self.store.keeper(stage, microbatch)

    def offload(self, action: Action) -> None:
        self.store.offload(*_of(action))

    def reload(self, action: Action) -> None:
        self._finish_before(action)
        self.store.reload(*_of(action))

    def _finish_before(self, action: Action) -> None:
        for copy in self._due.get(action, ()):
            self.store.finish(*_of(copy))


def build_activations(run: ResolvedRun, rank: int, weights: torch.Tensor) -> ActivationCopies | None:
    """What moves and measures the activations of a pipeline rank; None if neither is asked for.

    Args:
        weights: The flat buffer of the rank's weights.
    """
    config = run.config.offload.activations
    if config.stages == "none" and not run.config.metrics.activations:
        return None
    return ActivationCopies(ActivationStore(weights.device, [weights], smallest_bytes=config.smallest_bytes), rank)


def _of(action: Action) -> tuple[int, int]:
    assert action.microbatch is not None, f"{action} belongs to a micro-batch"
    return action.stage, action.microbatch
