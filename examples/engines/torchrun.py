"""torchrun: `torchrun --nproc-per-node 2 examples/engines/torchrun.py MODEL FOLDER RESULTS`."""

import os
import sys
from pathlib import Path

import numpy as np

import cropr_kernels as cropr

model, folder, out = sys.argv[1:]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
photos = sorted(Path(folder).rglob("*.jpg"))[rank::world]
results = cropr.Predictor(model)(photos, names=map(str, photos))
Path(out).mkdir(parents=True, exist_ok=True)
np.savez(f"{out}/{rank}.npz", **results)
