"""What a user says about ZeRO: one classic stage number, or three numbers of neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class ThreeNumbers:
    """Over how many neighbours the parameters, gradients and optimizer state of a unit are spread.

    1 <= params <= grads <= optim, each a divisor of the next and of the data-shard degree. ZeRO stage 0 is
    (1, 1, 1), stage 1 is (1, 1, N), stage 2 is (1, N, N), stage 3 is (N, N, N).
    """

    params: int
    grads: int
    optim: int


class ZeroConfig(BaseModel):
    """How far the state of the model is spread over the data-shard axis."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Literal[0, 1, 2] | None = Field(
        default=None, description="ZeRO stage: 0 none, 1 optimizer state, 2 also gradients. Default 1."
    )
    grads: Annotated[int, Field(ge=1)] | Literal["all"] | None = Field(
        default=None, description="Ranks that share one copy of the gradients: 1 or all (instead of stage)."
    )
    optim: Annotated[int, Field(ge=1)] | Literal["all"] | None = Field(
        default=None, description="Ranks that share one copy of the optimizer state: 1 or all (instead of stage)."
    )

    def numbers(self, shard_degree: int) -> ThreeNumbers:
        """The three numbers for a data-shard axis of `shard_degree` ranks.

        Raises:
            ValueError: a number is neither 1 nor the whole axis, they are not ascending, or both a stage and
                numbers are given. `problems` says the same as text.
        """
        problems = self.problems(shard_degree)
        if problems:
            raise ValueError("; ".join(rule for _, _, rule, _ in problems))
        if self.grads is None and self.optim is None:
            stage = 1 if self.stage is None else self.stage
            return ThreeNumbers(1, shard_degree if stage >= 2 else 1, shard_degree if stage >= 1 else 1)
        return ThreeNumbers(1, self._number(self.grads, shard_degree), self._number(self.optim, shard_degree))

    def problems(self, shard_degree: int) -> list[tuple[str, object, str, str]]:
        """What is wrong for this axis, each as (key, value, rule, fix)."""
        found: list[tuple[str, object, str, str]] = []
        if self.stage is not None and (self.grads is not None or self.optim is not None):
            fix = "keep zero.stage, or keep zero.grads and zero.optim"
            found.append(("stage", self.stage, "a stage and numbers cannot both be given", fix))
            return found
        for key in ("grads", "optim"):
            number = self._number(getattr(self, key), shard_degree)
            if number not in (1, shard_degree):
                rule = f"must be 1 or the data-shard degree, {shard_degree}"
                found.append((key, number, rule, f"set zero.{key} to 1 or all, or change parallel.data_shard"))
        grads, optim = (self._number(value, shard_degree) for value in (self.grads, self.optim))
        if grads > optim:
            rule = f"gradients cannot be spread over more ranks than the optimizer state ({optim})"
            found.append(("grads", grads, rule, "set zero.optim: all"))
        return found

    @staticmethod
    def _number(value: int | str | None, shard_degree: int) -> int:
        if value is None:
            return 1
        return shard_degree if value == "all" else int(value)
