"""Signals that stop a command."""

import os
import signal
import sys
import threading
from types import FrameType


class Signals:
    """While it is entered, SIGINT and SIGTERM raise KeyboardInterrupt, so that temporary files and processes go.

    A second one kills. Under torchrun, which passes on the terminal's SIGINT, that second one is ignored, and SIGTERM,
    by which it ends processes that may wait for others for ever, kills at once.
    """

    def __init__(self) -> None:
        self.caught, self.process = 0, os.getpid()
        self.launched = "TORCHELASTIC_RUN_ID" in os.environ

    @property
    def name(self) -> str:
        return "terminated" if self.caught == signal.SIGTERM else "interrupted"

    def __enter__(self) -> "Signals":
        wanted = [signal.SIGINT] if self.launched else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is not threading.main_thread():
            wanted = []
        self.before = {one: signal.signal(one, self._stop) for one in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        if self.caught:  # this process ends; another signal must not interrupt that
            return
        for one, handler in self.before.items():
            signal.signal(one, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # one that reads data, forked with this handler, ends in silence
            sys.exit(0)
        self.caught = number
        for one in self.before:
            signal.signal(one, signal.SIG_IGN if self.launched else signal.SIG_DFL)
        raise KeyboardInterrupt
