"""The `cropr` command."""

import importlib
import os
import re
import signal
import sys

from .arguments import make_parser
from .signals import Signals


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status.

    Errors are one message on stderr, with status 1. SIGINT (Ctrl-C) and SIGTERM remove temporary
    files, print one sentence about the state that is left, and return 130 or 143.
    """
    with Signals() as signals:
        name = "cropr"
        after_stop = "nothing was done"
        try:
            options = make_parser().parse_args(arguments)
            name = f"cropr {options.command}"
            after_stop = options.after_stop.format(**vars(options))
            module, _, function = options.run.rpartition(".")
            getattr(importlib.import_module(f"cropr_kernels.cli.{module}"), function)(options)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader closed the pipe, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would report it again at exit
            return 128 + signal.SIGPIPE
        except BaseException as error:
            if signals.caught:  # libraries may have wrapped it
                if os.environ.get("RANK", "0") == "0":
                    print(f"{name}: {signals.name}; {after_stop}", file=sys.stderr)
                return 128 + signals.caught
            if not isinstance(error, ImportError | OSError | RuntimeError | TypeError | ValueError):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            # The error of a data worker includes its traceback: the last line is the message.
            message = lines[-1] if "DataLoader worker process" in lines[0] else "\n".join(lines)
            message = re.sub(rf"^(cropr\.\w+:|{name}) ", "", message)  # the prefix repeats the name
            print(f"{name}: {message}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
