"""How far some work is, on stderr."""

import importlib.util
import sys
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from .optional import import_optional

_DELAY, _EVERY = 2.0, 30.0  # seconds until a bar is shown, and between two lines
Item = TypeVar("Item")


class Progress:
    """How far some work is: a bar on a terminal, where tqdm is installed, elsewhere a line every 30 seconds.

    Work that takes less time than two seconds, or than one line, says nothing.

    Args:
        what: the work, such as "calibrating".
        total: of its steps, where that is known.
        done: steps that need not be done again.
        show: whether to say anything at all.
        beat: for one long step: show the time by a thread. Not beside work whose time is measured.
    """

    def __init__(self, what: str, total: int | None = None, *, done: int = 0, show: bool = True, beat: bool = False):
        self.what, self.total, self.done, self.first, self.note = what, total, done, done, ""
        self.show, self.beat, self.bar, self.told = show, beat, None, False
        self.stopped = threading.Event()
        self.started = self.line_at = time.monotonic()
        if show and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            options: dict[str, Any] = {"bar_format": "{desc}: {elapsed}"} if beat else {}
            tqdm = import_optional("tqdm", "demo", "a progress bar").tqdm
            options |= {"desc": what, "total": total, "initial": done, "delay": _DELAY, "leave": False}
            self.bar = tqdm(mininterval=1, **options)

    def __enter__(self) -> "Progress":
        if self.show and self.beat:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        if self.bar is not None:
            self.bar.close()
        elif self.told:
            self._tell()

    def update(self, steps: int = 1, note: str = "") -> None:
        """So many steps more are done; the note is shown until there is another."""
        self.done += steps
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(steps)
        elif self.show and time.monotonic() - self.line_at >= _EVERY:
            self._tell()

    def _tell(self) -> None:
        self.line_at, self.told = time.monotonic(), True
        seconds, parts = self.line_at - self.started, []
        if not self.beat:
            parts.append(str(self.done) if self.total is None else f"{self.done} of {self.total}")
        parts.append(f"{seconds:.0f} s")
        if self.total is not None and self.first < self.done < self.total:
            parts.append(f"about {seconds / (self.done - self.first) * (self.total - self.done):.0f} s left")
        print(f"{self.what}: {', '.join(filter(None, [*parts, self.note]))}", file=sys.stderr, flush=True)

    def _beat(self) -> None:
        while not self.stopped.wait(1.0):
            if self.bar is not None and time.monotonic() - self.started >= _DELAY:
                self.bar.refresh()
            self.update(0)


def announce(what: str, work: str, seconds: float) -> None:
    """Say how long work of more than two seconds will take."""
    if seconds > _DELAY:
        print(f"{what}: {work}, about {seconds:.0f} s", file=sys.stderr, flush=True)


def each(items: Collection[Item], what: str, *, show: bool = True) -> Iterator[Item]:
    """The items, and how many of them are done."""
    with Progress(what, len(items), show=show) as progress:
        for item in items:
            yield item
            progress.update()
