"""What it costs to split the backward of the real model: I and then W against B, one process, one thread.

atoll trains benchmarks/step.py's decoder with two programs in turns, `1f1b` (B) and `zb-h1` (I, W), and an observer
of the executor takes the time of every pass. torch's generic split (`stage_backward_input` and
`stage_backward_weight`, which its zero-bubble schedules use) does the same to the plain decoder behind its embedding.
Both without recomputation and with every block recomputed; how often a block then runs its forward is counted.
What is judged is CPU time: with one thread it is the time on a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout without installation

from benchmarks import common
from benchmarks.step import MICRO_BATCH, MODEL, SEED, SEQUENCE

MICROBATCHES = 2
RECOMPUTE = ("none", "full")
BAR = 1.05
PEER_ROUNDS = 1
"""torch takes part in so many rounds: with recomputation, its split takes as long as everything else together."""

Times = dict[str, float]
"""Seconds of wall and of CPU time by pass, as F, F cpu, B, B cpu and so on; "forwards": of a block, per micro-batch."""
Rounds = Callable[[bool], Times]
"""Trains on `MICROBATCHES` micro-batches, with the backward split or not."""


class Watch:
    """Adds up the time of passes."""

    def __init__(self) -> None:
        self.times: Times = {}

    @contextmanager
    def __call__(self, op: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        for key, seconds in ((op, time.perf_counter() - wall), (f"{op} cpu", time.process_time() - cpu)):
            self.times[key] = self.times.get(key, 0.0) + seconds

    def taken(self) -> Times:
        """The times so far, which start again at zero."""
        times, self.times = self.times, {}
        return times


def batches() -> list[np.ndarray]:
    """Tokens of each micro-batch, (B, S + 1), the same for everybody."""
    random = np.random.default_rng(SEED)
    return list(random.integers(0, MODEL["vocab"], (MICROBATCHES, MICRO_BATCH, SEQUENCE + 1)))


def atoll(recompute: str) -> Rounds:
    """atoll's engine, as a run builds it."""
    import torch

    from parallel.mesh import Mesh
    from parallel.pipeline.actions import Action
    from parallel.pipeline.costs import Costs
    from parallel.pipeline.schedules.registry import generate
    from trainer.build import Recomputed, build_engine
    from trainer.config.run import BatchSizes, ResolvedRun, RunConfig
    from trainer.program import complete_program

    config = RunConfig.model_validate(
        {
            "run": {"directory": "runs/benchmark", "seed": SEED, "device": "cpu"},
            "model": MODEL,
            "data": {"path": "none: the tokens are random"},
            "train": {
                "steps": 100,
                "sequence": SEQUENCE,
                "micro_batch": MICRO_BATCH,
                "gradient_accumulation": MICROBATCHES,
                "recompute": recompute,
            },
        }
    )
    layout = config.parallel.layout(1)
    batch = BatchSizes.solve(config.train, layout.data)
    assert isinstance(batch, BatchSizes), batch
    run = ResolvedRun(config, layout, batch)
    watch = Watch()

    @contextmanager
    def observer(kind: str, action: Action) -> Iterator[None]:
        with watch(str(action.op)):
            yield

    engine = build_engine(run, Mesh(layout, "cpu", config.comm.algorithm), torch.device("cpu"), observer)
    units = dict(engine.train_executor.stages[0].units)
    block = units["blocks.0"]
    forwards = counted(block.module if isinstance(block, Recomputed) else block)
    programs = {
        split: complete_program(run, generate("zb-h1" if split else "1f1b", 1, MICROBATCHES)) for split in (False, True)
    }

    def step(split: bool) -> Times:
        engine.adopt(programs[split], Costs())
        engine.train(batches(), 0.0)
        return watch.taken() | {"forwards": forwards() / MICROBATCHES}

    return step


def torch_split(recompute: str) -> Rounds:
    """The plain decoder behind its embedding, as a stage of torch.distributed.pipelining runs it."""
    import torch
    from torch.distributed.pipelining._backward import stage_backward, stage_backward_input, stage_backward_weight
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    from trainer.models.config import ModelConfig
    from trainer.models.decoder import Decoder

    torch.manual_seed(SEED)
    decoder = Decoder(ModelConfig.model_validate(MODEL))
    blocks = list(decoder.blocks)
    weights = [weight for module in (*blocks, decoder.head) for weight in module.parameters()]
    forwards, watch = counted(blocks[0]), Watch()

    def forward(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute == "full" else block(x)
        return cross_entropy(decoder.head(x).flatten(0, 1), targets.reshape(-1))

    def step(split: bool) -> Times:
        for each in batches():
            tokens = torch.from_numpy(each)
            x = decoder.embed(tokens[:, :-1]).detach().requires_grad_()
            with watch("F"):
                loss = forward(x, tokens[:, 1:])
            if split:
                with watch("I"):
                    _, groups = stage_backward_input([loss], None, [x], iter(weights))
                with watch("W"):
                    stage_backward_weight(iter(weights), groups)
            else:
                with watch("B"):
                    stage_backward(loss, None, [x])
        decoder.zero_grad(set_to_none=True)
        return watch.taken() | {"forwards": forwards() / MICROBATCHES}

    return step


SYSTEMS: Mapping[str, Callable[[str], Rounds]] = {"atoll": atoll, "torch": torch_split}


def counted(module: Any) -> Callable[[], int]:
    """How often the module has run its forward since the last time of asking."""
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))

    def taken() -> int:
        count = len(calls)
        calls.clear()
        return count

    return taken


def measure(rounds: int) -> dict[str, list[list[Times]]]:
    """For each system and recomputation, round by round: the times of a whole and of a split backward."""
    import torch

    from parallel.mesh import start_process_group

    torch.set_num_threads(1)
    start_process_group("cpu", 0, 1, timeout_seconds=120.0)
    steps = {f"{name}, recompute {mode}": make(mode) for name, make in SYSTEMS.items() for mode in RECOMPUTE}
    found: dict[str, list[list[Times]]] = {name: [] for name in steps}
    for step in steps.values():  # warms up
        for split in (False, True):
            step(split)
    for number in range(rounds):
        for name, step in steps.items():
            if name.startswith("torch") and number >= PEER_ROUNDS:
                continue
            order = (False, True) if number % 2 == 0 else (True, False)
            taken = {split: step(split) for split in order}
            found[name].append([taken[False], taken[True]])
    return found


def rows(measured: Mapping[str, Sequence[Sequence[Times]]]) -> list[common.Row]:
    """One row a system and recomputation: times of the passes, I + W against B, and forwards of a block."""
    found = []
    for name, pairs in measured.items():
        passes = {op: common.spread(1e3 * pair[op in "IW"][op] / MICROBATCHES for pair in pairs) for op in "BIW"}
        forwards = {pair[split]["forwards"] for pair in pairs for split in (False, True)}
        found.append(
            {
                "name": f"split backward, {name}",
                **{f"{op}_milliseconds": times for op, times in passes.items()},
                "split_ratio": common.spread((split["I"] + split["W"]) / whole["B"] for whole, split in pairs),
                "split_cpu_ratio": common.spread(
                    (split["I cpu"] + split["W cpu"]) / whole["B cpu"] for whole, split in pairs
                ),
                "forwards_per_microbatch": max(forwards),
            }
        )
    return found


def bars(found: Sequence[common.Row]) -> list[common.Row]:
    """atoll's split may cost little, and recompute once."""
    bounds = []
    for each in found:
        if "atoll" in each["name"]:
            ratio, again = each["split_cpu_ratio"]["median"], each["forwards_per_microbatch"] - 1
            bounds.append(common.bar(f"CPU time, (I + W) / B, {each['name']}", ratio, BAR, "lower"))
            allowed = float(each["name"].endswith("full"))
            bounds.append(common.bar(f"recomputations of a block, {each['name']}", again, allowed, "lower"))
    return bounds


def run(rounds: int) -> tuple[list[common.Row], list[common.Row]]:
    """Rows and bars, measured in a fresh process."""
    (measured,) = common.run_ranks([str(Path(__file__).resolve()), "--rounds", str(rounds)], 1)
    found = rows(measured)
    return found, bars(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, required=True)
    print(json.dumps(measure(parser.parse_args().rounds)), flush=True)
