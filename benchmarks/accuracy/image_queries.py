"""Targets of the query for image tokens behind a tower, compared without a pretrained VLM.

python -m benchmarks.accuracy.image_queries --data FOLDER [--photos 100] [--seeds 5 6 7]
[--out FILE]

A pretrained ViT-Ti stands for both: its first blocks are the tower, the last three the reader, and
the class token in the reader is the text that looks at image tokens. Queries are fitted on some
photos to the attention in the last three blocks of the tower, or to that of the reader's class
token. Of other photos those patches go to the
reader that have the highest scores, or the highest in each of as many equal runs. Rows: agreement
with the reader of all patches, KL divergence, and the share of the reader's attention that the kept
patches hold.
"""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy.agreement import agreement
from benchmarks.accuracy.data import DATA, TRAIN, VAL, load_model, read_photos
from benchmarks.utils.results import RESULTS, Results, environment
from cropr_kernels.importance import AttentionInputs, importance
from cropr_kernels.models.vit import ViT
from cropr_kernels.vlm.calibration import Regression
from cropr_kernels.vlm.choice import choose, choose_highest

EVEN = "evenly spaced"
TOWER, READER = "tower", "reader"
TARGETS = (TOWER, READER)
HIGHEST, RUNS = "highest", "of runs"
CHOICES = {HIGHEST: choose_highest, RUNS: choose}
SHARES = (0.5, 0.25, 0.125)
NUM_READER = 3  # blocks, and as many of the tower are its last ones
RIDGE = 1e-2


class Observed(NamedTuple):
    tokens: Tensor  # (B, N, D), as they leave the tower
    log_probs: Tensor  # (B, classes), of the reader of all
    targets: dict[str, Tensor]  # (B, patches) each


def observe(model: ViT, images: Tensor) -> Observed:
    """Run the unpruned model, and note what the tower gives and what each target is."""
    x, rope = model.embed(images)
    depth = len(model.blocks)
    prefix = model.num_prefix_tokens
    tokens = x
    tower: list[Tensor] = []
    reader: list[Tensor] = []
    for index, block in enumerate(model.blocks):
        if index == depth - NUM_READER:
            tokens = x
        with AttentionInputs() as attention:
            x = block(x, rope)
        if index >= depth - NUM_READER:
            reader.append(importance(attention.inputs[0], prefix, class_token=True))
        elif index >= depth - 2 * NUM_READER:
            tower.append(importance(attention.inputs[0], prefix, class_token=False))
    targets = {TOWER: torch.stack(tower).mean(0), READER: torch.stack(reader).mean(0)}
    return Observed(tokens, read(model, tokens), targets)


def read(model: ViT, tokens: Tensor) -> Tensor:
    """Log-probabilities (B, classes) that the reader makes of the class token and patches (B, K,
    D)."""
    for block in model.blocks[-NUM_READER:]:
        tokens = block(tokens)
    return model.forward_head(model.norm(tokens)).log_softmax(1)


def fit(model: ViT, images: Tensor) -> dict[str, Tensor]:
    """The query (D,) of each target."""
    regressions = {name: Regression() for name in TARGETS}
    for batch in images.split(50):
        observed = observe(model, batch)
        patches = observed.tokens[:, model.num_prefix_tokens :]
        for name, regression in regressions.items():
            for rows, target in zip(patches, observed.targets[name]):
                regression.add(rows, target)
    return {name: regression.solve(0, RIDGE) for name, regression in regressions.items()}


def measure(
    model: ViT, observed: Observed, query: Tensor | None, share: float, choice: str
) -> dict[str, float]:
    """Compare the reader of the chosen patches with the reader of all."""
    prefix = model.num_prefix_tokens
    patches = observed.tokens[:, prefix:]
    count = round(share * patches.shape[1])
    kept = torch.stack([CHOICES[choice](rows, count, query) for rows in patches])
    selected = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    log_probs = read(model, torch.cat([observed.tokens[:, :prefix], selected], 1))
    percent_agreed, divergence = agreement(log_probs, observed.log_probs)
    attention = observed.targets[READER].gather(1, kept).sum(1).mean()
    return {
        "agreement": round(percent_agreed, 2),
        "KL": round(divergence, 4),
        "attention": round(100 * float(attention), 2),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7])
    parser.add_argument("--out", type=Path, default=RESULTS / "image_queries.json")
    options = parser.parse_args()
    model, _ = load_model(options.data)
    env = environment("cpu") | {"photos": options.photos, "model": "vit_tiny_patch16_224"}
    results = Results(options.out, env, keys=("data", "seed"))
    cells = itertools.product(DATA, options.seeds)
    for data, seed in tqdm(list(results.remaining(cells)), mininterval=5):
        calibration, _ = read_photos(options.data / DATA[data], TRAIN, options.photos, seed)
        images, _ = read_photos(options.data / DATA[data], VAL, options.photos, seed)
        queries = fit(model, calibration)
        parts = [observe(model, batch) for batch in images.split(50)]
        targets = {
            name: torch.cat([part.targets[name] for part in parts]) for name in parts[0].targets
        }
        observed = Observed(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            targets,
        )
        variants = [(EVEN, RUNS), *itertools.product(TARGETS, CHOICES)]
        rows = [
            {"data": data, "seed": seed, "keep": share, "target": name, "choice": choice}
            | measure(model, observed, queries.get(name), share, choice)
            for share, (name, choice) in itertools.product(SHARES, variants)
        ]
        results.add(*rows)


if __name__ == "__main__":
    main()
