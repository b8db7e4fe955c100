"""Interleaved programs of interpreted kernels: another may go on before each load, store and
atomic.

Triton's interpreter runs one program after another, in order, so that none ever meets a half-done
one.
"""

import inspect
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from triton.runtime import interpreter

_MEMORY = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
_builder: Any = interpreter.interpreter_builder


class _Turns:
    """Threads of which one runs at a time, drawn at random at every turn."""

    def __init__(self, draw: random.Random):
        self.draw, self.errors, self.local = draw, [], threading.local()
        self.waiting: dict[int, threading.Semaphore] = {}

    def run(self, programs: list[tuple[Any, Any]]) -> None:
        """Run all (grid index, function) pairs to their end."""
        threads = []
        for index, function in programs:
            self.waiting[len(threads)] = threading.Semaphore(0)
            threads.append(
                threading.Thread(target=self._run_one, args=(len(threads), index, function))
            )
        for thread in threads:
            thread.start()
        self._wake()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _run_one(self, me: int, index: Any, function: Any) -> None:
        self.local.me, self.local.index = me, index
        self._sleep()
        try:
            function()
        except BaseException as error:
            self.errors.append(error)
        del self.waiting[me]
        self._wake()

    def _sleep(self) -> None:
        self.waiting[self.local.me].acquire()
        _builder.grid_idx = self.local.index

    def _wake(self) -> None:
        if self.waiting:
            self.waiting[self.draw.choice(list(self.waiting))].release()

    def switch(self) -> None:
        self._wake()
        self._sleep()


class _Grid:
    """Stand-in for a kernel that collects its programs and runs them once the grid is complete."""

    def __init__(self, kernel: Any, turns: _Turns):
        self.kernel, self.turns, self.programs = kernel, turns, []
        # Read by the interpreter
        self.__name__, self.__globals__ = kernel.__name__, kernel.__globals__
        self.__signature__ = inspect.signature(kernel)

    def __call__(self, **args: Any) -> None:
        self.programs.append((_builder.grid_idx, lambda: self.kernel(**args)))
        if len(self.programs) == _builder.grid_dim[0]:
            self.turns.draw.shuffle(self.programs)
            self.turns.run(self.programs)


@contextmanager
def interleaved(seed: int) -> Iterator[None]:
    """Interleave the programs of kernels launched inside, in an order drawn from the seed."""
    turns = _Turns(random.Random(seed))

    class Executor(interpreter.GridExecutor):
        def __init__(self, fn: Any, *args: Any):
            super().__init__(fn, *args)
            self.fn = _Grid(fn, turns)

    def switching(operation: Any) -> Any:
        def call(*args: Any) -> Any:
            turns.switch()
            return operation(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "GridExecutor", Executor)
        for name in _MEMORY:
            patch.setattr(_builder, name, switching(getattr(_builder, name)))
        yield


@contextmanager
def counting_loads() -> Iterator[Counter]:
    """Count the loads of each program, by grid index, summed over the kernels launched inside."""
    loads, load = Counter(), _builder.create_masked_load

    def counted(*args: Any) -> Any:
        loads[_builder.grid_idx] += 1
        return load(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_builder, "create_masked_load", counted)
        yield loads
