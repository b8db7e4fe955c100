"""Counts by image against constant ones, at equal mean FLOPs, without labels and training.

python -m benchmarks.accuracy.adaptive --data FOLDER [--photos 300] [--seeds 0 1 2] [--rates 4 8 12
15] [--methods ...]

FOLDER as in data.py. Each seed draws its photos: for calibration (queries, then thresholds on the
first of them) from the training split, and as many for comparison from the validation split. An
interrupted run resumes.

Methods:
  constant        every image loses R tokens a module
  thresholds      an image merges what costs at most the threshold of the module, found on the
                  calibration photos (`cropr.calibrate`)
  same quotas     every image merges the quota, at the costs and candidates of "thresholds"
  batch of 32     the cheapest merges of each batch of 32, the quota times 32 a module: nothing is
                  calibrated, but an image depends on those beside it
  capacity of 32  as "thresholds", batches of 32, whose rows are padded in each block to 1.05 times
                  the mean of the calibration photos, as graphs would be; one with more rows runs
                  as it is. FLOPs include the padding.

Where the mean FLOPs of a method differ by more than 0.7 % from those of the constant rate, its rate
changes until they do not; both stand in the row.
"""

from benchmarks.accuracy.budgets import METHODS, Network
from benchmarks.accuracy.equal_flops import compare, parse_options


def main() -> None:
    compare(parse_options(__doc__, METHODS, "adaptive.json"), Network, {})


if __name__ == "__main__":
    main()
