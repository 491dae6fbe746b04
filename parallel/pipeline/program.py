"""A training step as data: for every rank, the ordered list of its actions.

A program says nothing about tensors or devices. It is what schedule authors generate, what passes transform,
what the verifier checks, the simulator times and the executor runs - the same object in every role.
Construction checks the shape only (types and ranges), so that a broken program can be loaded, shown and
explained; `verify` says whether a program is right.

The CSV form has one row a rank and one action a cell, below three comment lines:

    # name: 1f1b
    # microbatches: 2
    # placement: 0 1
    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1

The comments may be left out: micro-batches and stages are then counted, and a stage is placed on the first
rank that lists it. A cell may be empty (other tools draw idle slots so); a rank without actions is a row
holding `-`.

Most programs hold the model once. A bidirectional schedule holds it several times: with `replicas` copies,
stage s of copy r is number r * depth + s, where depth = stages / replicas, and each copy works on an equal,
contiguous share of the micro-batches. A fourth comment line, `# replicas:`, says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from parallel.pipeline.actions import TRANSFER_OPS, Action, Op

_IDLE = "-"
_HEADER = ("name", "microbatches", "placement", "replicas")


@dataclass(frozen=True)
class Program:
    """What each rank does in one training step, in order.

    Attributes:
        name: one printable line, mostly the schedule's name.
        ranks: number of pipeline ranks.
        stages: number of pipeline stages, those of all copies of the model together.
        microbatches: micro-batches per step.
        placement: the rank of each stage, `stages` long.
        actions: one ordered list a rank, `ranks` long.
        replicas: how often the model is there.

    Raises:
        ValueError: counts, lengths, a stage or a micro-batch out of range.
    """

    name: str
    ranks: int
    stages: int
    microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    replicas: int = 1

    def __post_init__(self) -> None:
        if not self.name or self.name != self.name.strip() or not self.name.isprintable():
            raise ValueError(f"program name {self.name!r} must be one printable line without space around it")
        for field in ("ranks", "stages", "microbatches", "replicas"):
            if getattr(self, field) < 1:
                raise ValueError(f"program {self.name!r}: {field}={getattr(self, field)} must be at least 1")
        for field in ("stages", "microbatches"):
            if getattr(self, field) % self.replicas:
                raise ValueError(
                    f"program {self.name!r}: {field}={getattr(self, field)} must be divisible by "
                    f"replicas={self.replicas}"
                )
        if len(self.placement) != self.stages:
            raise ValueError(
                f"program {self.name!r}: placement {self.placement} must give a rank to each of "
                f"{self.stages} stages"
            )
        for stage, rank in enumerate(self.placement):
            if not 0 <= rank < self.ranks:
                raise ValueError(
                    f"program {self.name!r}: stage {stage} is placed on rank {rank} of {self.ranks} ranks"
                )
        if len(self.actions) != self.ranks:
            raise ValueError(
                f"program {self.name!r}: {len(self.actions)} lists of actions for {self.ranks} ranks"
            )
        for rank, listed in enumerate(self.actions):
            for cell, action in enumerate(listed):
                self._check_cell(rank, cell, action)

    def _check_cell(self, rank: int, cell: int, action: Action) -> None:
        if not isinstance(action, Action):
            raise TypeError(f"program {self.name!r}, rank {rank}, cell {cell}: {action!r} is not an Action")
        if action.stage >= self.stages:
            raise ValueError(
                f"program {self.name!r}, rank {rank}, cell {cell}: {action} is of stage {action.stage}, "
                f"the program has stages 0 to {self.stages - 1}"
            )
        if action.microbatch is not None and action.microbatch >= self.microbatches:
            raise ValueError(
                f"program {self.name!r}, rank {rank}, cell {cell}: {action} is of micro-batch "
                f"{action.microbatch}, the program has micro-batches 0 to {self.microbatches - 1}"
            )

    @cached_property
    def listed(self) -> frozenset[Action]:
        """Every action that any rank lists."""
        return frozenset(action for listed in self.actions for action in listed)

    @cached_property
    def keys(self) -> frozenset[tuple[Op, int, int | None]]:
        """(op, stage, micro-batch) of every action that any rank lists."""
        return frozenset((action.op, action.stage, action.microbatch) for listed in self.actions for action in listed)

    @cached_property
    def by_stage(self) -> Mapping[tuple[Op, int], tuple[Action, ...]]:
        """The listed actions of each (op, stage) that has any, without repetition."""
        found: dict[tuple[Op, int], dict[Action, None]] = {}
        for listed in self.actions:
            for action in listed:
                found.setdefault((action.op, action.stage), {})[action] = None
        return {key: tuple(actions) for key, actions in found.items()}

    @cached_property
    def ops(self) -> frozenset[Op]:
        """Every op that any rank lists."""
        return frozenset(action.op for action in self.listed)

    @cached_property
    def has_transfers(self) -> bool:
        """Whether sends and receives have been placed; a schedule as generated has compute only."""
        return not self.ops.isdisjoint(TRANSFER_OPS)

    @cached_property
    def crossings(self) -> tuple[bool, ...]:
        """For each stage, whether its output goes to another rank; false for a last stage."""
        following = map(self.after, range(self.stages))
        return tuple(
            after is not None and rank != self.placement[after]
            for rank, after in zip(self.placement, following, strict=True)
        )

    @cached_property
    def depth(self) -> int:
        """Stages of one copy of the model."""
        return self.stages // self.replicas

    def part_of(self, stage: int) -> int:
        """Which part of the model a stage holds, counted from 0."""
        return stage % self.depth

    def before(self, stage: int) -> int | None:
        """The stage that feeds a stage; None at the start of the model."""
        return stage - 1 if stage % self.depth else None

    def after(self, stage: int) -> int | None:
        """The stage that a stage feeds; None at the end of the model."""
        return stage + 1 if (stage + 1) % self.depth else None

    def twins_of(self, stage: int) -> tuple[int, ...]:
        """The stages of the other copies that hold the same part of the model, ascending."""
        return tuple(twin for twin in range(stage % self.depth, self.stages, self.depth) if twin != stage)

    def replica_of(self, microbatch: int) -> int:
        """The copy of the model that works on a micro-batch."""
        return microbatch * self.replicas // self.microbatches

    def microbatches_of(self, stage: int) -> range:
        """The micro-batches that pass through a stage."""
        share = self.microbatches // self.replicas
        first = stage // self.depth * share
        return range(first, first + share)

    def passes_through(self, stage: int, microbatch: int) -> bool:
        """Whether a micro-batch passes through a stage."""
        return stage // self.depth == self.replica_of(microbatch)

    def rank_of(self, stage: int) -> int:
        """The rank that runs a stage."""
        return self.placement[stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, ascending."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    def with_actions(self, actions: Iterable[Iterable[Action]]) -> Program:
        """The same program with other lists of actions, one a rank."""
        return replace(self, actions=tuple(tuple(listed) for listed in actions))

    def to_csv(self) -> str:
        """The text form; `Program.from_csv` gives the same program back."""
        header = [self.name, str(self.microbatches), " ".join(str(rank) for rank in self.placement)]
        header += [str(self.replicas)] if self.replicas > 1 else []
        lines = [f"# {key}: {value}" for key, value in zip(_HEADER, header, strict=False)]
        lines += [",".join(str(action) for action in listed) or _IDLE for listed in self.actions]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_csv(
        cls,
        text: str,
        *,
        name: str | None = None,
        microbatches: int | None = None,
        placement: Sequence[int] | None = None,
    ) -> Program:
        """A program from its text form; arguments take precedence over the comment lines of the text.

        Raises:
            ValueError: a cell that is not an action (rank and cell are named), no rows, a bad comment line,
                or whatever the construction of the program refuses.
        """
        header, rows = _read_rows(text)
        if not rows:
            raise ValueError("the CSV text has no rows; write one row a rank, for example 0F0,0B0")
        actions = tuple(_read_row(rank, row) for rank, row in enumerate(rows))
        if microbatches is None:
            counted = 1 + max((action.microbatch or 0 for listed in actions for action in listed), default=0)
            microbatches = _number(header, "microbatches", counted)
        if placement is None:
            placement = _placement(header, actions)
        return cls(
            name=name or header.get("name", "csv"),
            ranks=len(actions),
            stages=len(placement),
            microbatches=microbatches,
            placement=tuple(placement),
            actions=actions,
            replicas=_number(header, "replicas", 1),
        )


def refuse(program: Program, ops: Iterable[Op], what: str) -> None:
    """Raise a ValueError if the program lists any of the ops: a pass that adds them would add them twice."""
    found = sorted(program.ops.intersection(ops))
    if found:
        raise ValueError(
            f"{what}: program {program.name!r} already lists {', '.join(found)}; apply it only once"
        )


def _read_rows(text: str) -> tuple[dict[str, str], list[str]]:
    """Comment lines as keys and values, and the rows that are left."""
    header: dict[str, str] = {}
    rows: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            key, _, value = line[1:].partition(":")
            if key.strip() in _HEADER:
                header[key.strip()] = value.strip()
        elif line.strip():
            rows.append(line)
    return header, rows


def _read_row(rank: int, row: str) -> tuple[Action, ...]:
    actions: list[Action] = []
    if row.strip() == _IDLE:
        return ()
    for cell, text in enumerate(row.split(",")):
        if text.strip():
            try:
                actions.append(Action.parse(text.strip()))
            except ValueError as error:
                raise ValueError(f"rank {rank}, cell {cell}: {error}") from error
    return tuple(actions)


def _integers(key: str, value: str) -> list[int]:
    numbers = value.split()
    if not numbers or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise ValueError(f"the comment '# {key}: {value}' must hold whole numbers with spaces between them")
    return [int(number) for number in numbers]


def _number(header: Mapping[str, str], key: str, default: int) -> int:
    """As the comment says, if there is one."""
    if key not in header:
        return default
    numbers = _integers(key, header[key])
    if len(numbers) > 1:
        raise ValueError(f"the comment '# {key}: {header[key]}' must hold one number")
    return numbers[0]


def _placement(header: Mapping[str, str], actions: Sequence[Sequence[Action]]) -> list[int]:
    """As the comment says, or each stage on the first rank that lists it."""
    if "placement" in header:
        return _integers("placement", header["placement"])
    ranks: dict[int, int] = {}
    for rank, listed in enumerate(actions):
        for action in listed:
            ranks.setdefault(action.stage, rank)
    stages = range(1 + max(ranks, default=0))
    absent = [stage for stage in stages if stage not in ranks]
    if absent:
        raise ValueError(
            f"no rank lists an action of stage {absent[0]}; write its row, or the comment '# placement:'"
        )
    return [ranks[stage] for stage in stages]
