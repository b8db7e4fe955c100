"""Accuracy of Cropr against no pruning on handwritten digits, and a picture of pruned patches.

python -m benchmarks.accuracy.digits [--seeds 3] [--out benchmarks/results/digits.json]
"""

import argparse
import statistics
from pathlib import Path

import cropr_kernels as cropr
from benchmarks.utils.results import DOCS, RESULTS, Results, environment
from cropr_kernels.utils.viz import save_pruning_maps
from examples import digits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    _, _, test_images, _ = digits.load()
    images = test_images[:8]
    picture = (DOCS if options.out.parent == RESULTS else options.out.parent) / "digits.png"
    maps = cropr.pruning_map(cropr.deploy(result.model), images)
    save_pruning_maps(picture, (images + 1) / 2, maps, depth=digits.MODEL["depth"])
    for method in ("no pruning", "Cropr"):
        accuracies = [row["accuracy"] for row in results.rows if row["method"] == method]
        print(f"{method:12}{statistics.mean(accuracies):.1f} %  {accuracies}")
    print(options.out, picture)


if __name__ == "__main__":
    main()
