"""What the options of `atoll schedule` say: costs, weights and limits from their text forms.

    --costs f=18.5,i=18.1,w=9.3,comm=0.6     one number for all stages of the model
    --costs f=10:12:12:9,i=10,w=5            f for each stage of the model, first to last
    --memory b=1,w=0.43                      what an activation weighs until I, and from I to W
    --memory-limit 24GB --activation 1.5GiB  in bytes, given those of one activation; or plainly in activations

Everything refused is a ScheduleError: the value, the rule, the fix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from parallel.pipeline.costs import Costs, PerStage
from parallel.pipeline.schedules.registry import ScheduleError, require
from parallel.sizes import UNITS, parse_bytes

COSTS: Mapping[str, str] = {
    "f": "forward_seconds",
    "i": "input_gradient_seconds",
    "w": "weight_gradient_seconds",
    "comm": "transfer_seconds",
    "offload": "offload_seconds",
    "reload": "reload_seconds",
    "reduce": "reduce_seconds",
    "sync": "sync_seconds",
    "update": "update_seconds",
    "gather": "gather_seconds",
}
MEMORY: Mapping[str, str] = {"b": "activation", "w": "weight_activation"}
KEPT_FOR_W = 0.4
"""What W reads of an activation: 0.37 to 0.43 in the models of the zero-bubble paper (arXiv:2401.10241, Table 1: 32 of
34 + 5as/h); more where attention keeps no scores."""
_PER_STAGE = {"f", "i", "w", "offload", "reload", "b"}


def costs_of(costs: str | None, memory: str | None) -> Costs:
    """The costs that both options say; what they leave out is F = I = W = 1, and nothing for the rest.

    An activation weighs 1, and KEPT_FOR_W of it is left between I and W.
    """
    values: dict[str, Any] = {}
    for option, text, known in (("--costs", costs, COSTS), ("--memory", memory, MEMORY)):
        for key, value in _pairs(option, text, known).items():
            values[known[key]] = value
    whole = values.get("activation", 1.0)
    halved = tuple(KEPT_FOR_W * each for each in whole) if isinstance(whole, tuple) else KEPT_FOR_W * whole
    return Costs(**{"weight_activation": halved, **values})


def memory_limit_of(limit: str | None, activation: str | None) -> float | None:
    """The limit in activations."""
    weight = None if activation is None else _size("--activation", activation, plain=False)
    if limit is None:
        require(
            weight is None,
            value=f"--activation {activation}",
            rule="it says what a memory limit in bytes comes to, and there is no limit",
            fix="add --memory-limit 24GB, or leave it out",
        )
        return None
    count = _size("--memory-limit", limit, plain=True)
    if not limit.strip()[-1].isalpha():
        require(
            weight is None,
            value=f"--memory-limit {limit}",
            rule="a number without a unit is in activations, and --activation would have nothing to say",
            fix=f"write the unit, as in {limit}GB, or leave --activation out",
        )
        return count
    if weight is None:
        raise ScheduleError(
            f"--memory-limit {limit}",
            "in bytes, it needs the bytes of one activation",
            "add --activation 1.5GiB, or give the limit in activations",
        )
    return count / weight


def offload_of(text: str | None) -> float:
    """How many stages of each rank are offloaded, as `Asked` takes it."""
    words = {None: 0.0, "all": math.inf, "half": 0.5}
    if text in words:
        return words[text]
    require(
        text is not None and text.isdecimal() and int(text) > 0,
        value=f"--offload {text}",
        rule="must be all, half, or a number of stages of each rank",
        fix="write --offload 1",
    )
    return float(text or 0)


def _pairs(option: str, text: str | None, known: Mapping[str, str]) -> dict[str, PerStage]:
    values: dict[str, PerStage] = {}
    for part in (text or "").split(",") if text is not None else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        example = f"write {option} as in {','.join(f'{name}=1' for name in list(known)[:3])}"
        require(
            bool(equals) and key in known,
            value=f"{option} {part.strip()!r}",
            rule=f"must be key=number, with a key of {', '.join(known)}",
            fix=f"b is I and W together, give i and w; {example}" if key == "b" else example,
        )
        require(key not in values, value=f"{option} {part!r}", rule=f"{key} is given twice", fix="give it once")
        values[key] = _numbers(option, key, value)
    return values


def _numbers(option: str, key: str, text: str) -> PerStage:
    """One number, or one for each stage of the model."""
    numbers: list[float] = []
    for word in text.split(":"):
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        require(
            math.isfinite(number) and number >= 0,
            value=f"{option} {key}={text}",
            rule="must be numbers that are not negative",
            fix=f"write {key}=1.5, or one number for each stage of the model as in {key}=1.5:2:2:1.5",
        )
        numbers.append(number)
    if len(numbers) == 1:
        return numbers[0]
    require(
        key in _PER_STAGE,
        value=f"{option} {key}={text}",
        rule=f"{key} is one number for all stages",
        fix=f"write {key}={numbers[0]:g}",
    )
    return tuple(numbers)


def _size(option: str, text: str, *, plain: bool) -> float:
    """A number of bytes, or, without a unit where that is allowed, of activations."""
    try:
        number = float(text) if plain and not text.strip()[-1:].isalpha() else parse_bytes(text)
    except ValueError:
        number = math.nan
    require(
        math.isfinite(number) and number > 0,
        value=f"{option} {text}",
        rule=f"must be a positive number with a unit of {', '.join(UNITS)}" + (", or of activations" if plain else ""),
        fix=f"write {option} 24GB" + (f" or {option} 8" if plain else ""),
    )
    return number
