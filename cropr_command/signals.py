"""Signals that stop a command."""

import os
import signal
import sys
import threading
from types import FrameType


class Signals:
    """Context in which SIGINT and SIGTERM raise KeyboardInterrupt, so that temporary files and
    processes are removed.

    A second signal kills. Under torchrun, which forwards the terminal's SIGINT, the second one is
    ignored, and SIGTERM, sent to processes that may wait for others forever, kills at once.
    """

    def __init__(self) -> None:
        self.caught = 0
        self.process = os.getpid()
        self.launched = "TORCHELASTIC_RUN_ID" in os.environ

    @property
    def name(self) -> str:
        return "terminated" if self.caught == signal.SIGTERM else "interrupted"

    def __enter__(self) -> "Signals":
        numbers = [signal.SIGINT] if self.launched else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        self.handlers = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        if self.caught:  # the process is ending; no signal may interrupt it
            return
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _stop(self, caught: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked data worker ends silently
            sys.exit(0)
        self.caught = caught
        for number in self.handlers:
            signal.signal(number, signal.SIG_IGN if self.launched else signal.SIG_DFL)
        raise KeyboardInterrupt
