"""A program as a text grid: one row a rank, one column a slot of time.

    1f1b: 2 ranks, 2 stages, 3 micro-batches
    rank 0 | F0 F1 .  .  B0 -- F2 B1 -- .  B2 --
    rank 1 | .  F0 B0 -- F1 B1 -- F2 B2 -- .  .

Time is that of a simulation, of unit costs (F = I = W = 1, B = 2) where no other is given. A slot is as long as
the shortest pass, or half, a third or a quarter of it where only that shows the others in their proportions;
starts and ends are rounded to slots, so nothing is further than half a slot from where it belongs. A dot is an
idle slot, dashes continue the action before them. Where a rank has several stages the stage leads the cell, as
in the text form of an action. The grid holds the passes (F, B, I, W); other actions of a lane appear, in listed
order, where one of them is marked. A program that gets stuck is shown as far as it runs, and the passes that
never run follow in listed order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

from parallel.pipeline.actions import PASS_OPS, Action
from parallel.pipeline.program import Program
from parallel.pipeline.simulate import Span, Timeline, simulate

_FINEST = 4  # slots to the shortest pass, at most
_TOLERANCE = 0.15  # by how much of its length a pass may be drawn too long or too short
_LONGEST = 12  # slots to the longest pass, at most; much shorter ones are then not drawn
_CUT = "... "


def render_grid(
    program: Program,
    marked: Collection[tuple[int, Action]] = (),
    *,
    timeline: Timeline | None = None,
    columns: int | None = None,
) -> str:
    """The grid of any program, broken ones included.

    Args:
        program: what to show.
        marked: (rank, action) pairs to set between exclamation marks; an action that the rank does not list
            is named at the end of the rank's row.
        timeline: of the program, for its times; None: unit costs.
        columns: of the terminal; slots in the middle are left out of a grid that is wider. None: any width.
    """
    timeline = timeline or simulate(program)
    slot = _slot_seconds(timeline)
    rows = [
        _Row(program, rank, spans, {action for owner, action in marked if owner == rank}, slot)
        for rank, spans in enumerate(timeline.spans)
    ]
    width = max(row.width for row in rows)
    slots = max(row.slots for row in rows)
    label = len(f"rank {program.ranks - 1}")
    title = (
        f"{program.name}: {_count(program.ranks, 'rank')}, {_count(program.stages, 'stage')}, "
        f"{_count(program.microbatches, 'micro-batch')}"
    )
    title += "" if slot == 1.0 else f"; one slot is {slot:.4g}"
    left_out = range(0)
    if columns is not None and label + 3 + slots * (width + 1) > columns:
        shown = max(2, (columns - label - 3 - len(_CUT)) // (width + 1))
        left_out = range((shown + 1) // 2, slots - shown // 2)
        title += f"; slots {left_out.start} to {left_out.stop - 1} of {slots} are left out"
    lines = [title]
    for rank, row in enumerate(rows):
        lines.append(f"{f'rank {rank}':<{label}} | {row.grid(slots, width, left_out)}{row.rest()}".rstrip())
        lines += [f"{'':<{label}} | {lane}" for lane in row.lanes()]
    return "\n".join(lines) + "\n"


def _slot_seconds(timeline: Timeline) -> float:
    """How long a slot is: the coarsest fraction of the shortest pass that shows all passes in proportion."""
    passes = {round(span.end - span.start, 9) for listed in timeline.spans for span in listed if _drawn(span)}
    if not passes:
        return 1.0
    shortest = min(passes)

    def error(slot: float) -> float:
        return max(abs(length - slot * _round(length / slot)) / length for length in passes)

    slots = [shortest / count for count in range(1, _FINEST + 1)]
    slot = next((slot for slot in slots if error(slot) <= _TOLERANCE), min(slots, key=error))
    return max(slot, max(passes) / _LONGEST)


def _drawn(span: Span) -> bool:
    return span.action.op in PASS_OPS and span.end > span.start


def _round(number: float) -> int:
    """Half up: whatever is at least a slot long stays so, wherever it begins."""
    return math.floor(number + 0.5)


class _Row:
    """What one rank does, and how it is written."""

    def __init__(
        self, program: Program, rank: int, spans: Sequence[Span], marked: Collection[Action], slot: float
    ) -> None:
        self.listed = program.actions[rank]
        self.marked = marked
        self.several = len({action.stage for action in self.listed}.union(program.stages_of(rank))) > 1
        self.passes = [span for span in spans if span.action.op in PASS_OPS]
        self.width = max((len(self.text(span.action)) for span in self.passes), default=1)
        self.cells = [(_round(span.start / slot), _round(span.end / slot), span.action) for span in self.passes]
        self.slots = max((end for _, end, _ in self.cells), default=0)

    def text(self, action: Action) -> str:
        text = str(action) if self.several else str(action).removeprefix(str(action.stage))
        return f"!{text}!" if action in self.marked else text

    def texts(self, actions: Collection[Action]) -> str:
        return " ".join(self.text(action) for action in actions)

    def grid(self, slots: int, width: int, left_out: range) -> str:
        """The passes in `slots` slots of `width` characters."""
        cells = [".".ljust(width)] * slots
        for start, end, action in self.cells:
            if end > start:
                cells[start:end] = [self.text(action).ljust(width), *["-" * width] * (end - start - 1)]
        if not left_out:
            return " ".join(cells)
        return " ".join(cells[: left_out.start]) + f" {_CUT}" + " ".join(cells[left_out.stop :])

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
