"""The training loop: a generator of steps, and the hooks that look at each.

    for record in loop.steps():
        for hook in hooks: hook(record)

A step is one run of the rank's program. Evaluation, checkpoints, metrics and traces are hooks: each sees the
record of the step that has just ended, on every rank, in the listed order.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from parallel.layout import AXES
from trainer.checkpoint.store import save
from trainer.data.batches import eval_cursors
from trainer.data.prefetch import Prefetch
from trainer.engine import UnderWay
from trainer.metrics.flops import flops_per_token, peak_flops
from trainer.metrics.passes import bubble_rate, span_and_busy
from trainer.metrics.record import StepRecord
from trainer.metrics.sinks import ConsoleSink, JsonLinesSink, Sink, TensorBoardSink
from trainer.metrics.spans import Span, spans_of, write_trace
from trainer.optim.learning_rate import learning_rate_factor
from trainer.profile import Profile
from trainer.session import Session
from trainer.signals import Signals

Hook = Callable[[StepRecord], None]


class _Launched(NamedTuple):
    """A step that has run, its outcome, and how long it took."""

    step: int
    under_way: UnderWay
    lr: float
    seconds: float


class Loop:
    """Trains a session to its last step, or until it is asked to stop.

    Attributes:
        stopped: Whether a signal ended the run before its last step.
    """

    def __init__(self, session: Session, signals: Signals) -> None:
        self.session, self.signals = session, signals
        self.stopped = False
        self._spans: list[Span] = []
        self._save_asked = False
        self._saved_step = session.step if session.resumed_from else -1
        self._first_step = session.step + 1
        self.profile = Profile(
            session.run, session.engine, session.timer, self._first_step, session.directory.costs
        )
        self._skipped = session.step - session.engine.optimizer.step_count()
        self._tokens_per_step = session.run.batch.global_batch * session.config.train.sequence
        self._flops_per_step = self._tokens_per_step * flops_per_token(
            session.config.model, session.config.train.sequence
        )
        self._peak = session.config.metrics.peak_flops
        if self._peak is None and session.device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(session.device))

    def run(self) -> None:
        """Every step, every hook."""
        sinks = self._sinks()
        written = [sink.write for sink in sinks]
        hooks: list[Hook] = [self._profile, self._evaluate, *written, self._checkpoint, self._trace]
        try:
            for record in self.steps():
                for hook in hooks:
                    hook(record)
        finally:
            for sink in sinks:
                sink.close()

    def steps(self) -> Iterator[StepRecord]:
        """Train step by step; what the consumer does between steps is not part of their time."""
        session, steps = self.session, self.session.config.train.steps
        size = session.run.batch.global_batch
        cursors = range(session.cursor, session.cursor + (steps - session.step) * size, size)
        waiting: _Launched | None = None  # a step whose outcome nobody has asked for yet
        with Prefetch(session.train_batches.step_batches, cursors) as batches:
            while session.step < steps and not self.stopped:
                launched = self._launch(batches)
                session.step += 1
                session.cursor += size
                if waiting is not None:
                    yield self._record(waiting)
                waiting = launched
                if not self._is_asked_late(session.step):
                    yield self._record(launched)
                    waiting = None
            if waiting is not None:
                yield self._record(waiting)

    def _is_asked_late(self, step: int) -> bool:
        """Whether the outcome of `step` may wait until the next step has run.

        It may where no rank waits for all others at the end of a step (`optimizer.validation: after`), except before
        anything that needs the weights of exactly this step.
        """
        if self.session.config.optimizer.validation == "before" or self.session.run.layout.pipeline == 1:
            return False
        steps = self.session.config.train.steps
        due = self._is_evaluated(step) or self._is_saved(step) or self._save_asked or step in self.profile.steps
        due = due or self._is_traced(step)  # the timer holds one step
        return not (due or step == steps)

    def _launch(self, batches: Prefetch[int, list[np.ndarray]]) -> _Launched:
        session, config, start = self.session, self.session.config, time.perf_counter()
        # Times and activations of a step are known when it is over, so they travel with the report of the next one.
        times = span_and_busy(session.timer.read())
        activations = session.engine.activations
        peak = 0 if activations is None else activations.store.meter.take_peak()
        report = (*self.signals.report(), memory_bytes(session.device), peak, *times)
        session.timer.begin(session.step + 1, everything=self._is_traced(session.step + 1))
        schedule = config.optimizer.learning_rate
        lr = config.optimizer.lr * learning_rate_factor(schedule, session.step, config.train.steps)
        under_way = session.engine.launch(next(batches), lr, report)
        if not self._is_asked_late(session.step + 1):
            under_way.result()  # which is part of the step's time then
        session.timer.end()
        return _Launched(session.step + 1, under_way, lr, time.perf_counter() - start)

    def _record(self, launched: _Launched) -> StepRecord:
        result, seconds = launched.under_way.result(), launched.seconds
        stop, save_asked, memory, activations = result.reports[:, :4].max(axis=0)
        self.stopped = stop > 0
        self._save_asked |= save_asked > 0
        self._skipped += result.skipped
        mfu = None
        if self._peak is not None:
            mfu = self._flops_per_step / (seconds * self._peak * self.session.place.world_size)
        return StepRecord(
            step=launched.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=launched.lr,
            seconds=seconds,
            tokens=launched.step * self._tokens_per_step,
            tokens_per_second=self._tokens_per_step / seconds,
            memory_bytes=int(memory),
            skipped_steps=self._skipped,
            mfu=mfu,
            bubble_rate=bubble_rate(result.reports[:, 4:]) if self.session.run.layout.pipeline > 1 else None,
            activation_bytes=int(activations) or None,
        )

    def _sinks(self) -> list[Sink]:
        session, config = self.session, self.session.config
        if not session.is_main:
            return []
        sinks: list[Sink] = [
            ConsoleSink(config.train.steps, config.metrics.every),
            JsonLinesSink(session.directory.metrics),
        ]
        if config.metrics.tensorboard:
            sinks.append(TensorBoardSink(session.directory.tensorboard, session.step))
        return sinks

    def _is_last(self, record: StepRecord) -> bool:
        last = self.stopped or record.step == self.session.config.train.steps
        return last and self._is_current(record)

    def _is_current(self, record: StepRecord) -> bool:
        """Whether the weights are those of the record's step; a step that is asked about late has been left behind."""
        return record.step == self.session.step

    def _is_evaluated(self, step: int) -> bool:
        train = self.session.config.train
        due = step == train.steps or (train.eval_every is not None and step % train.eval_every == 0)
        return due and train.eval_batches > 0

    def _is_saved(self, step: int) -> bool:
        every = self.session.config.checkpoint.every
        return every is not None and step % every == 0

    def _profile(self, record: StepRecord) -> None:
        if record.bubble_rate is not None:  # of the step before, so with the prediction for its program
            record.predicted_bubble_rate = self.profile.predicted_before
        self.profile.after(record.step)

    def _evaluate(self, record: StepRecord) -> None:
        session, train = self.session, self.session.config.train
        if not self._is_evaluated(record.step):
            return
        cursors = eval_cursors(session.eval_windows, session.run.batch.global_batch, train.eval_batches)
        losses = [session.engine.evaluate(session.eval_batches.step_batches(cursor)) for cursor in cursors]
        record.eval_loss = float(np.mean(losses))

    def _checkpoint(self, record: StepRecord) -> None:
        session, config = self.session, self.session.config.checkpoint
        at_end = self._is_last(record) and (config.at_end or self.stopped)
        due = self._is_saved(record.step) or at_end or self._save_asked
        if not due or not self._is_current(record):
            return
        self._save_asked = False
        if self._saved_step == record.step:
            return
        session.engine.finish()
        path = save(
            session.engine,
            session.run,
            session.directory.checkpoints,
            step=record.step,
            cursor=session.cursor,
            keep=config.keep,
        )
        self._saved_step = record.step
        if session.is_main:
            print(f"checkpoint {path}", flush=True)

    def _is_traced(self, step: int) -> bool:
        """The first step is left out: it pays for warming up."""
        config = self.session.config.metrics
        return config.spans and 0 < step - self._first_step <= config.span_steps

    def _trace(self, record: StepRecord) -> None:
        """Behind the last traced step, write what was recorded."""
        if not self._is_traced(record.step):
            return
        self._spans += spans_of(self.session.timer)
        if self._is_last(record) or not self._is_traced(record.step + 1):
            group = self.session.mesh.channel(*AXES).group
            write_trace(self.session.directory.trace, self._spans, group)


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
