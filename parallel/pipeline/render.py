"""A program as a text grid: one row a rank, one column a unit of time.

    1f1b: 2 ranks, 2 stages, 3 micro-batches
    rank 0 | F0 F1 .  .  B0 -- F2 B1 -- .  B2 --
    rank 1 | .  F0 B0 -- F1 B1 -- F2 B2 -- .  .

Time is that of unit costs (F = I = W = 1, B = 2). A dot is an idle slot, dashes continue the action before
them. Where a rank has several stages the stage leads the cell, as in the text form of an action. The grid
holds the passes (F, B, I, W); other actions of a lane appear, in listed order, where one of them is marked. A
program that gets stuck is shown as far as it runs, and the passes that never run follow in listed order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from parallel.pipeline.actions import PASS_OPS, Action
from parallel.pipeline.program import Program
from parallel.pipeline.simulate import Span, simulate


def render_grid(program: Program, marked: Collection[tuple[int, Action]] = ()) -> str:
    """The grid of any program, broken ones included.

    Args:
        program: what to show.
        marked: (rank, action) pairs to set between exclamation marks; an action that the rank does not list
            is named at the end of the rank's row.
    """
    rows = [
        _Row(program, rank, spans, {action for owner, action in marked if owner == rank})
        for rank, spans in enumerate(simulate(program).spans)
    ]
    width = max(row.width for row in rows)
    slots = max(row.slots for row in rows)
    label = len(f"rank {program.ranks - 1}")
    lines = [
        f"{program.name}: {_count(program.ranks, 'rank')}, {_count(program.stages, 'stage')}, "
        f"{_count(program.microbatches, 'micro-batch')}"
    ]
    for rank, row in enumerate(rows):
        lines.append(f"{f'rank {rank}':<{label}} | {row.grid(slots, width)}{row.rest()}".rstrip())
        lines += [f"{'':<{label}} | {lane}" for lane in row.lanes()]
    return "\n".join(lines) + "\n"


class _Row:
    """What one rank does, and how it is written."""

    def __init__(
        self, program: Program, rank: int, spans: Sequence[Span], marked: Collection[Action]
    ) -> None:
        self.listed = program.actions[rank]
        self.marked = marked
        self.several = len({action.stage for action in self.listed}.union(program.stages_of(rank))) > 1
        self.passes = [span for span in spans if span.action.op in PASS_OPS]
        self.width = max((len(self.text(span.action)) for span in self.passes), default=1)
        self.slots = round(max((span.end for span in self.passes), default=0.0))

    def text(self, action: Action) -> str:
        text = str(action) if self.several else str(action).removeprefix(str(action.stage))
        return f"!{text}!" if action in self.marked else text

    def texts(self, actions: Collection[Action]) -> str:
        return " ".join(self.text(action) for action in actions)

    def grid(self, slots: int, width: int) -> str:
        """The passes in `slots` slots of `width` characters."""
        cells = [".".ljust(width)] * slots
        for span in self.passes:
            start, end = round(span.start), round(span.end)
            cells[start:end] = [self.text(span.action).ljust(width), *["-" * width] * (end - start - 1)]
        return " ".join(cells)

    def rest(self) -> str:
        """Passes that never run, and marked actions that are not listed."""
        stuck = Counter(self.listed) - Counter(span.action for span in self.passes)
        never = [action for action in stuck.elements() if action.op in PASS_OPS]
        absent = sorted(set(self.marked).difference(self.listed), key=str)
        rest = f" | never runs: {self.texts(never)}" if never else ""
        return rest + (f" | not listed: {self.texts(absent)}" if absent else "")

    def lanes(self) -> list[str]:
        """The lanes on which anything but a pass is marked, with all such actions."""
        others = [action for action in self.listed if action.op not in PASS_OPS]
        lanes = dict.fromkeys(action.lane for action in others if action in self.marked)
        return [f"{lane}: {self.texts([a for a in others if a.lane is lane])}" for lane in lanes]


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"
