"""A training step of atoll against a bare PyTorch loop, torch DDP and torch FSDP2, on CPU cores.

Everybody trains the same decoder of about 25M parameters in fp32 from the same initial weights on the same
tokens, with fused AdamW and gradients clipped to a global norm of 1, one thread per rank:

- one process: atoll against a plain loop over the plain module;
- two ranks: atoll with ZeRO stage 0 against DDP (state whole everywhere), and stages 1 and 2 against
  `fully_shard` of every block and the root, which keeps parameters gathered after the forward or not.

Contestants take turns, each turn in fresh processes; a bar holds the median over rounds of the ratio of two
neighbouring turns. The peers must end with atoll's loss, or the comparison is void and fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installation

from benchmarks import common

MODEL = {"vocab": 8192, "hidden": 512, "layers": 8, "heads": 8, "ffn_hidden": 672}
"""25.05M parameters: 8.39M in embedding and head, 8.39M in attention, 8.26M in the SwiGLU feed-forwards."""
SEQUENCE, MICRO_BATCH = 256, 2
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP, SEED = 3e-4, (0.9, 0.95), 0.1, 1.0, 1
WARM_UP_STEPS = 2
LOSS_TOLERANCE = 1e-4

Step = Callable[[np.ndarray], float]
"""Trains on tokens (B, S + 1) and returns the mean loss in nats per token, of this rank or of all."""


@dataclass(frozen=True)
class Contestant:
    """Who trains: atoll at a ZeRO stage, or a peer."""

    system: Literal["atoll", "bare", "ddp", "fsdp2"]
    ranks: int
    stage: int = 0
    reshard: bool = False

    @property
    def name(self) -> str:
        detail = {"atoll": f" stage {self.stage}", "fsdp2": " reshard" if self.reshard else " no reshard"}
        return f"{self.system}{detail.get(self.system, '')} x{self.ranks}"


@dataclass(frozen=True)
class Pair:
    """A comparison: atoll, a peer, the least ratio of their tokens/s, and whether memory is judged as well."""

    atoll: Contestant
    peer: Contestant
    bar: float
    memory: bool = False


PAIRS = (
    Pair(Contestant("atoll", 1), Contestant("bare", 1), 0.98),
    Pair(Contestant("atoll", 2, stage=0), Contestant("ddp", 2), 1.0),
    Pair(Contestant("atoll", 2, stage=1), Contestant("fsdp2", 2, reshard=False), 1.15, memory=True),
    Pair(Contestant("atoll", 2, stage=2), Contestant("fsdp2", 2, reshard=True), 1.15, memory=True),
)
CONTESTANTS = {each.name: each for pair in PAIRS for each in (pair.atoll, pair.peer)}


def atoll(contestant: Contestant) -> Step:
    """atoll's engine, as a run builds it, without the loop around it."""
    import torch

    from parallel.mesh import Mesh
    from trainer.build import build_engine
    from trainer.config.run import BatchSizes, ResolvedRun, RunConfig

    config = RunConfig.model_validate(
        {
            "run": {"directory": "runs/benchmark", "seed": SEED, "device": "cpu"},
            "model": MODEL,
            "data": {"path": "none: the tokens are random"},
            "train": {
                "steps": 100,
                "sequence": SEQUENCE,
                "micro_batch": MICRO_BATCH,
                "gradient_accumulation": 1,
            },
            "optimizer": {"betas": BETAS, "weight_decay": WEIGHT_DECAY, "grad_clip": CLIP},
            "zero": {"stage": contestant.stage},
        }
    )
    layout = config.parallel.layout(contestant.ranks)
    batch = BatchSizes.solve(config.train, layout.data)
    assert isinstance(batch, BatchSizes), batch
    mesh = Mesh(layout, "cpu", config.comm.algorithm)
    engine = build_engine(ResolvedRun(config, layout, batch), mesh, torch.device("cpu"))
    return lambda tokens: engine.train([tokens], LEARNING_RATE).loss


def peer(contestant: Contestant) -> Step:
    """The plain decoder in a plain loop, with a peer's wrapper around it."""
    import torch
    from torch import nn

    from parallel.flat.space import ParameterSpec
    from trainer.models.config import ModelConfig
    from trainer.models.decoder import Decoder
    from trainer.models.initialize import initial_weight

    config = ModelConfig.model_validate(MODEL)
    decoder = Decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(initial_weight(config, ParameterSpec(name, shape, shape), SEED))
    model: nn.Module = decoder
    if contestant.system == "ddp":
        # Views save DDP a copy of the gradients: its best setting here, in speed and in memory.
        model = nn.parallel.DistributedDataParallel(decoder, gradient_as_bucket_view=True)
    elif contestant.system == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in decoder.blocks:
            fully_shard(block, reshard_after_forward=contestant.reshard)
        fully_shard(decoder, reshard_after_forward=contestant.reshard)
    parameters = list(model.parameters())
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [each for each in parameters if each.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)

    def step(batch: np.ndarray) -> float:
        tokens = torch.from_numpy(batch)
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(contestant: Contestant, steps: int) -> common.Row:
    """One rank's part of a turn: `steps` timed steps after the warm-up, without pause between them."""
    import torch
    import torch.distributed as dist

    from parallel.mesh import start_process_group

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    start_process_group("cpu", rank, contestant.ranks, timeout_seconds=120.0)
    start_rss = common.peak_rss_bytes()
    step = atoll(contestant) if contestant.system == "atoll" else peer(contestant)
    random = np.random.default_rng([SEED, rank])
    batches = random.integers(0, MODEL["vocab"], (WARM_UP_STEPS + steps, MICRO_BATCH, SEQUENCE + 1))
    seconds, loss, cpu_start = [], float("nan"), 0.0
    for number, batch in enumerate(batches):
        if number == WARM_UP_STEPS:
            cpu_start = common.cpu_seconds()
        start = time.perf_counter()
        loss = step(batch)
        seconds.append(time.perf_counter() - start)
    cpu = (common.cpu_seconds() - cpu_start) / steps
    dist.barrier()
    dist.destroy_process_group()
    return {
        "step_seconds": statistics.median(seconds[WARM_UP_STEPS:]),
        "cpu_seconds": cpu,
        "start_rss_bytes": start_rss,
        "peak_rss_bytes": common.peak_rss_bytes(),
        "loss": loss,
    }


def turn(contestant: Contestant, steps: int) -> common.Row:
    """One turn of all ranks: the slowest rank's time, the largest memory, the mean loss."""
    arguments = [str(Path(__file__).resolve()), "--measure", contestant.name, "--steps", str(steps)]
    ranks = common.run_ranks(arguments, contestant.ranks)
    seconds = max(rank["step_seconds"] for rank in ranks)
    return {
        "tokens_per_second": contestant.ranks * MICRO_BATCH * SEQUENCE / seconds,
        "cpu_seconds_per_step": sum(rank["cpu_seconds"] for rank in ranks),
        "start_rss_bytes": max(rank["start_rss_bytes"] for rank in ranks),
        "peak_rss_bytes": max(rank["peak_rss_bytes"] for rank in ranks),
        "loss": statistics.fmean(rank["loss"] for rank in ranks),
    }


def summary(measured: Mapping[str, Sequence[common.Row]]) -> tuple[list[common.Row], list[common.Row]]:
    """Rows and bars from the turns of every contestant, in round order.

    Raises:
        ValueError: a peer did not end with atoll's loss: they did not do the same work.
    """
    rows: list[common.Row] = []
    bars: list[common.Row] = []
    for pair in PAIRS:
        ours, theirs = measured[pair.atoll.name], measured[pair.peer.name]
        _check_losses(pair, ours[0]["loss"], theirs[0]["loss"])
        ratios = _ratios(ours, theirs, "tokens_per_second")
        rows.append(
            {
                **_row(pair.atoll, ours),
                "peer": pair.peer.name,
                "speed_ratio": common.spread(ratios),
                "cpu_ratio": common.spread(_ratios(ours, theirs, "cpu_seconds_per_step")),
            }
        )
        rows.append(_row(pair.peer, theirs))
        names = f"{pair.atoll.name} / {pair.peer.name}"
        speed = common.significant(statistics.median(ratios))
        bars.append(common.bar(f"tokens/s, {names}", speed, pair.bar, "higher"))
        if pair.memory:
            memory = common.significant(statistics.median(_ratios(ours, theirs, "peak_rss_bytes")))
            bars.append(common.bar(f"peak RSS per rank, {names}", memory, 1.0, "lower"))
    return rows, bars


def _ratios(ours: Sequence[common.Row], theirs: Sequence[common.Row], key: str) -> list[float]:
    return [mine[key] / other[key] for mine, other in zip(ours, theirs, strict=True)]


def _row(contestant: Contestant, turns: Sequence[common.Row]) -> common.Row:
    return {
        "name": contestant.name,
        "ranks": contestant.ranks,
        "tokens_per_second": common.spread(turn["tokens_per_second"] for turn in turns),
        "cpu_seconds_per_step": common.spread(turn["cpu_seconds_per_step"] for turn in turns),
        "start_rss_bytes": round(statistics.median(turn["start_rss_bytes"] for turn in turns)),
        "peak_rss_bytes": round(statistics.median(turn["peak_rss_bytes"] for turn in turns)),
        "loss": turns[0]["loss"],
    }


def _check_losses(pair: Pair, ours: float, theirs: float) -> None:
    if not abs(ours - theirs) <= LOSS_TOLERANCE * abs(theirs):
        raise ValueError(
            f"{pair.atoll.name} ended with loss {ours:.6f} and {pair.peer.name} with {theirs:.6f}: they differ by more "
            f"than {LOSS_TOLERANCE:g}, so they did not do the same work and cannot be compared"
        )


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contestant")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--measure", choices=sorted(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(CONTESTANTS[options.measure], options.steps)), flush=True)
        return 0
    measured: dict[str, list[common.Row]] = {name: [] for name in CONTESTANTS}
    for number, name in common.turns(list(CONTESTANTS), options.rounds):
        taken = turn(CONTESTANTS[name], options.steps)
        measured[name].append(taken)
        common.say(options, f"round {number}: {name}: {taken['tokens_per_second']:.0f} tokens/s")
    rows, bars = summary(measured)
    result = common.report("step", rows, bars)
    result["settings"] = {"model": MODEL, "sequence": SEQUENCE, "micro_batch": MICRO_BATCH, "steps": options.steps}
    return common.publish(result, options)


if __name__ == "__main__":
    sys.exit(main())
