"""Quality of scores before training: correlation with later attention, overlap with objects.

python -m benchmarks.accuracy.scorers --data FOLDER [--photos 300] [--seeds 2 3 4] [--out FILE]

FOLDER as in data.py. The unpruned network runs on photos of Tiny-ImageNet outside the calibration
set. For each block: the rank correlation of the scores of its patches with the attention they
receive in later blocks, and the share of the better half that lies in the object's box. The last
rows measure the agreement, before training, with Last Layer Fusion, with dropping at once, and with
other scores in some or all blocks.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy.agreement import agreement, calibrated, log_probabilities
from benchmarks.accuracy.cells import curve
from benchmarks.accuracy.data import DATA, TRAIN, VAL, Encoded, load_model, patches_in, read_photos
from benchmarks.baselines.modules import MODULES, replace_modules
from benchmarks.baselines.network import Context, attention_of
from benchmarks.baselines.selection import variance_scores
from benchmarks.models.deployment import pruned
from benchmarks.utils.results import RESULTS, Results, Row, environment
from cropr_kernels.importance import AttentionInput, importance
from cropr_kernels.models.blocks import project_heads
from cropr_kernels.models.vit import ViT

SCHEDULES: dict[str, dict[str, Any]] = {
    "dec, R = 14": dict(rate=14),
    **{f"dec, R falls ({power})": dict(keep=curve(power)) for power in (0.5, 0.7)},
    **{f"dec, R rises ({power})": dict(keep=curve(power)) for power in (1.3, 1.5)},
    "merging, R = 14": dict(rate=14, merge=True),
    **{f"merging, R falls ({power})": dict(keep=curve(power), merge=True) for power in (0.5, 0.7)},
    **{f"merging, R rises ({power})": dict(keep=curve(power), merge=True) for power in (1.3, 1.5)},
    "dec, R = 14, LLF": dict(rate=14, llf=True),
    "dec, R = 17, LLF": dict(rate=17, llf=True),
    "const": dict(const=(4, 79)),
    "const, LLF": dict(const=(4, 60), llf=True),
}
# The scorer that replaces the query, and the blocks (of 11) after which it does, at R = 14.
REPLACED: dict[str, tuple[str, list[int]]] = {
    "dec, R = 14, attention top-k": ("attention top-k", [*range(11)]),
    "dec, R = 14, attention top-k but for blocks 1 and 8": (
        "attention top-k",
        [1, 2, 3, 4, 5, 6, 8, 9, 10],
    ),
    "dec, R = 14, variance": ("variance", [*range(11)]),
    "dec, R = 14, variance but for blocks 3 to 8": ("variance", [0, 1, 8, 9, 10]),
    "dec, R = 14, random": ("random", [*range(11)]),
    "dec, R = 14, random but for blocks 3 to 8": ("random", [0, 1, 8, 9, 10]),
}


def ranks(values: Tensor) -> Tensor:
    order = values.argsort(1).argsort(1).double()
    return order - order.mean(1, keepdim=True)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of (B, N)."""
    return torch.nn.functional.cosine_similarity(ranks(a), ranks(b), dim=1)


def scores_of(
    base: Any, queries: list[Tensor], images: Tensor
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """For each block but the last: scores by scorer, and the attention patches receive later."""
    scores: list[dict[str, Tensor]] = []
    attended: list[Tensor] = []
    x, _ = base.embed(images)
    for layer, block in enumerate(base.blocks):
        q, k, _ = project_heads(block.attn, block.norm1(x))
        attended.append(importance(AttentionInput(q, k), 1, class_token=True))
        class_row = attention_of(q[:, :, :1], k, Context())[:, :, 0].mean(1)
        x = block(x)
        if layer < len(queries):
            by_scorer = {"Cropr, calibrated": x @ queries[layer], "attention top-k": class_row}
            by_scorer |= {"variance": variance_scores(x)}
            patch_scores = {name: values[:, 1:] for name, values in by_scorer.items()}
            scores.append(patch_scores | {"random": torch.rand(len(x), 196)})
    return [
        (scores[layer], torch.stack(attended[layer + 1 :]).mean(0)) for layer in range(len(scores))
    ]


def measure_scores(base: ViT, model: Any, images: Tensor, inside: Tensor) -> list[Row]:
    """Correlation and overlap by scorer and block; inside (B, patches) marks the object's box."""
    metrics: dict[tuple[str, int], list[Tensor]] = {}
    queries = [module.query() for module in model.cropr][: len(base.blocks) - 1]
    for batch, box in zip(images.split(50), inside.split(50)):
        for layer, (by_scorer, target) in enumerate(scores_of(base, queries, batch)):
            for name, scores in by_scorer.items():
                share = box.gather(1, scores.topk(98, 1).indices).double().mean(1)
                metrics.setdefault((name, layer), []).append(
                    torch.stack([correlation(scores, target), share], 1)
                )
    rows = []
    for (name, layer), batches in metrics.items():
        rank, share = torch.cat(batches).mean(0).tolist()
        rows.append({"scorer": name, "block": layer, "correlation": rank, "in box": 100 * share})
    return rows


def measure_schedules(base: ViT, model: Any, images: Tensor) -> list[Row]:
    """Agreement by schedule, and with other scorers at R = 14."""
    expected = log_probabilities(base, images)
    rows = []
    for name, schedule in (SCHEDULES | dict.fromkeys(REPLACED, SCHEDULES["dec, R = 14"])).items():
        scheduled = pruned(base, **schedule)
        for module, calibrated_module in zip(scheduled.cropr, model.cropr):
            module.load_state_dict(calibrated_module.state_dict())
        if name in REPLACED:
            scorer, layers = REPLACED[name]
            replace_modules(scheduled, MODULES[scorer], layers)
        percent_agreed, divergence = agreement(log_probabilities(scheduled, images), expected)
        rows.append({"schedule": name, "agreement": percent_agreed, "KL": divergence})
    return rows


@torch.no_grad()
def measure(options: argparse.Namespace, base: ViT, seed: int) -> list[Row]:
    path = options.data / DATA["Tiny-ImageNet"]
    torch.manual_seed(seed)
    model = calibrated(base, read_photos(path, TRAIN, options.photos, seed)[0])
    images, _ = read_photos(path, VAL, options.photos, seed)
    inside = patches_in(torch.as_tensor(Encoded(path, VAL, options.photos, seed).boxes).float())
    rows = measure_scores(base, model, images, inside) + measure_schedules(base, model, images)
    return [{"seed": seed} | row for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--out", type=Path, default=RESULTS / "scorers.json")
    options = parser.parse_args()
    base, _ = load_model(options.data)
    results = Results(options.out, environment("cpu") | {"photos": options.photos})
    for seed in tqdm(options.seeds, desc="seeds"):
        results.add(*measure(options, base, seed))


if __name__ == "__main__":
    main()
