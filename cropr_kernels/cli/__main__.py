"""The `cropr` command, as `torchrun -m cropr_kernels.cli` starts it."""

import sys

from cropr_command.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
