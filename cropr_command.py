"""Starts the `cropr` command: it can be interrupted from the first moment on, also while its libraries are loaded."""

import os
import sys


def main() -> int:
    try:
        from cropr_kernels.cli.__main__ import main as run
    except KeyboardInterrupt:
        print("cropr: interrupted before it began", file=sys.stderr, flush=True)
        os._exit(130)  # half-loaded libraries cannot end in order
    return run()
