"""Accuracy of Cropr against no pruning on the handwritten digits, several seeds.

python -m benchmarks.accuracy.digits [--seeds 3] [--out benchmarks/results/digits.json]
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.utils.results import RESULTS, Results, environment
from examples import digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "digits.json")
    options = parser.parse_args()
    results = Results(options.out, environment("cpu"))
    for seed in range(options.seeds):
        for method, rate in (("no pruning", 0), ("Cropr", digits.RATE)):
            result = digits.train(seed, rate)
            results.add(
                {
                    "method": method,
                    "seed": seed,
                    "epochs": digits.EPOCHS,
                    "accuracy": round(result.accuracy, 2),
                    "token share": round(result.token_share, 3),
                }
            )
    for method in ("no pruning", "Cropr"):
        accuracies = [row["accuracy"] for row in results.rows if row["method"] == method]
        print(f"{method:12}{statistics.mean(accuracies):.1f} %  {accuracies}")
    print(options.out)


if __name__ == "__main__":
    main()
