"""Progress of long work, on stderr."""

import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

from .optional import import_optional

_DELAY = 2.0  # seconds until a bar is shown
_INTERVAL = 30.0  # seconds between two lines
Item = TypeVar("Item", covariant=True)


class SizedIterable(Protocol[Item]):
    """Items of a known number, such as a list or a DataLoader."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


class Progress:
    """Progress of long work: a bar on a terminal if tqdm is installed, else a line every 30
    seconds.

    Work of less than two seconds shows no bar, of less than 30 seconds no line.

    Args:
        label: the work, such as "calibrating".
        total: number of steps, if it is known.
        done: number of steps done before.
        show: False for no output.
        ticks: show the elapsed time of one long step, from a thread. Not for work that is timed.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        done: int = 0,
        show: bool = True,
        ticks: bool = False,
    ):
        self.label = label
        self.total = total
        self.first = self.done = done
        self.note = ""
        self.show = show
        self.ticks = ticks
        self.bar = None
        self.printed = False
        self.stopped = threading.Event()
        self.started = self.line_at = time.monotonic()
        if show and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            options: dict[str, Any] = {"bar_format": "{desc}: {elapsed}"} if ticks else {}
            tqdm = import_optional("tqdm", "demo", "a progress bar").tqdm
            options |= {
                "desc": label,
                "total": total,
                "initial": done,
                "delay": _DELAY,
                "leave": False,
            }
            self.bar = tqdm(mininterval=1, **options)

    def __enter__(self) -> "Progress":
        if self.show and self.ticks:
            threading.Thread(target=self._refresh, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        if self.bar is not None:
            self.bar.close()
        elif self.printed:
            self._print_line()

    def update(self, steps: int = 1, note: str = "") -> None:
        """Count finished steps; a note is shown until the next one."""
        self.done += steps
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(steps)
        elif self.show and time.monotonic() - self.line_at >= _INTERVAL:
            self._print_line()

    def _print_line(self) -> None:
        self.line_at = time.monotonic()
        self.printed = True
        seconds = self.line_at - self.started
        parts = []
        if not self.ticks:
            parts.append(str(self.done) if self.total is None else f"{self.done} of {self.total}")
        parts.append(f"{seconds:.0f} s")
        if self.total is not None and self.first < self.done < self.total:
            parts.append(
                f"about {seconds / (self.done - self.first) * (self.total - self.done):.0f} s left"
            )
        print(
            f"{self.label}: {', '.join(filter(None, [*parts, self.note]))}",
            file=sys.stderr,
            flush=True,
        )

    def _refresh(self) -> None:
        while not self.stopped.wait(1.0):
            if self.bar is not None and time.monotonic() - self.started >= _DELAY:
                self.bar.refresh()
            self.update(0)


def announce(label: str, amount: str, seconds: float) -> None:
    """Print the expected duration of work of more than two seconds."""
    if seconds > _DELAY:
        print(f"{label}: {amount}, about {seconds:.0f} s", file=sys.stderr, flush=True)


def each(items: SizedIterable[Item], label: str, *, show: bool = True) -> Iterator[Item]:
    """Yield the items, with progress."""
    with Progress(label, len(items), show=show) as progress:
        for item in items:
            yield item
            progress.update()
