"""How long actions take, in seconds, and what activations weigh.

A transfer is charged once, to its receive. Anything not named here takes no time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from parallel.pipeline.actions import Action, Op

PerStage = float | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds per action; the defaults are unit costs (F = I = W = 1, so B = 2, and everything else free).

    Attributes:
        forward_seconds: F, one number for all stages or one a stage.
        input_gradient_seconds: I, likewise.
        weight_gradient_seconds: W, likewise. B takes I + W.
        transfer_seconds: from the end of a send's producer to the arrival at the other rank.
        reduce_seconds: REDUCE.
        update_seconds: UPDATE.
        offload_seconds: OFFLOAD, one number or one a stage.
        reload_seconds: RELOAD, likewise.
        gather_seconds: GATHER, GATHER_F and GATHER_I.
        sync_seconds: SYNC.
        activation: what a forward keeps for its backward, one number or one a stage; in any one unit, such as
            bytes. The default counts activations.
        weight_activation: what is left of it between I and W, likewise; None: all of it.

    Raises:
        ValueError: a negative, infinite or missing number.
    """

    forward_seconds: PerStage = 1.0
    input_gradient_seconds: PerStage = 1.0
    weight_gradient_seconds: PerStage = 1.0
    transfer_seconds: float = 0.0
    reduce_seconds: float = 0.0
    update_seconds: float = 0.0
    offload_seconds: PerStage = 0.0
    reload_seconds: PerStage = 0.0
    gather_seconds: float = 0.0
    sync_seconds: float = 0.0
    activation: PerStage = 1.0
    weight_activation: PerStage | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or not all(math.isfinite(number) and number >= 0 for number in numbers):
                raise ValueError(f"costs: {field.name}={value} must be finite and not negative")

    def require_stages(self, stages: int) -> None:
        """Raise a ValueError unless every cost given a stage is given for all of `stages` stages of the model."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(f"costs: {field.name} lists {len(value)} stages, the model has {stages}")

    def activation_of(self, stage: int) -> float:
        """What a forward of the stage keeps."""
        return _of_stage(self.activation, stage)

    def weight_activation_of(self, stage: int) -> float:
        """What of that is left between I and W."""
        kept = self.activation if self.weight_activation is None else self.weight_activation
        return _of_stage(kept, stage)

    def seconds(self, action: Action) -> float:
        """How long the action occupies its lane."""
        match action.op:
            case Op.F:
                return _of_stage(self.forward_seconds, action.stage)
            case Op.B:
                return _of_stage(self.input_gradient_seconds, action.stage) + _of_stage(
                    self.weight_gradient_seconds, action.stage
                )
            case Op.I:
                return _of_stage(self.input_gradient_seconds, action.stage)
            case Op.W:
                return _of_stage(self.weight_gradient_seconds, action.stage)
            case Op.RECV_F | Op.RECV_I:
                return self.transfer_seconds
            case Op.REDUCE:
                return self.reduce_seconds
            case Op.UPDATE:
                return self.update_seconds
            case Op.OFFLOAD:
                return _of_stage(self.offload_seconds, action.stage)
            case Op.RELOAD:
                return _of_stage(self.reload_seconds, action.stage)
            case Op.GATHER | Op.GATHER_F | Op.GATHER_I:
                return self.gather_seconds
            case Op.SYNC:
                return self.sync_seconds
            case _:
                return 0.0


def _of_stage(value: PerStage, stage: int) -> float:
    # Copies of a model (a bidirectional schedule) cost the same: the stages of one are given.
    return value[stage % len(value)] if isinstance(value, tuple) else value
