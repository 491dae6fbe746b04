"""The next steps' batches are made by a thread while the current step computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

A = TypeVar("A")
T = TypeVar("T")


class Prefetch(Generic[A, T]):
    """Iterates over `produce(argument)` for the arguments in order, `depth` results ahead of the consumer.

    One thread produces, so results come in order and `produce` need not be thread-safe against itself. An
    error in `produce` is raised where its result is asked for, and ends the iteration. Use it as a context
    manager, or `close()` it: that waits for the call that is running and drops the rest.
    """

    def __init__(self, produce: Callable[[A], T], arguments: Iterable[A], depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"the prefetch depth must be at least 1, not {depth}")
        self._produce = produce
        self._arguments = iter(arguments)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[T]] = deque()
        for _ in range(depth):
            self._submit()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._ahead:
            raise StopIteration
        due = self._ahead.popleft()
        self._submit()
        try:
            return due.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop producing and end the thread. May be called again."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Prefetch[A, T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self) -> None:
        for argument in self._arguments:
            self._ahead.append(self._pool.submit(self._produce, argument))
            return
