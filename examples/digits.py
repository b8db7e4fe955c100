"""Train a small ViT with and without Cropr on the handwritten digits bundled with scikit-learn.

Without pretrained weights the demo calibrates the unpruned one, and merges its tokens.
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import cropr_kernels as cropr
from cropr_kernels.utils.progress import Progress

EPOCHS = 20
BATCH = 64
RATE = 20
TEST = 360  # images
MODEL = dict(
    img_size=16,
    patch_size=2,
    in_chans=1,
    num_classes=10,
    embed_dim=48,
    depth=4,
    num_heads=4,
    mlp_ratio=2.0,
)


@dataclass
class Result:
    model: torch.nn.Module
    accuracy: float  # on the test digits, in percent
    token_share: float  # tokens per block, over those of the unpruned network


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images (B, 1, 16, 16) in [-1, 1] and labels for training, then for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = interpolate(images, size=(16, 16), mode="bilinear")
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test = order[:TEST]
    train = order[TEST:]
    return images[train], labels[train], images[test], labels[test]


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def train(seed: int, rate: int, epochs: int = EPOCHS, show: bool = True) -> Result:
    """Train one network (rate 0: unpruned); the rate rises over the first half of the epochs."""
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = load()
    model = cropr.create_vit("vit_tiny_patch16_224", **MODEL)
    share = 1.0
    if rate:
        cropr.apply(model, rate=rate)
        kept = cropr.Schedule(rate=rate).counts(65, MODEL["depth"])
        share = sum([65, *kept]) / (65 * MODEL["depth"])
    batches = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=epochs * batches, pct_start=0.2
    )
    with Progress("training on digits", epochs * batches, show=show) as progress:
        for epoch in range(epochs):
            if rate:
                cropr.set_rate(model, min(rate, round(2 * rate * epoch / epochs)))
            model.train()
            for batch in torch.randperm(len(images))[: batches * BATCH].view(batches, BATCH):
                output = model(images[batch])
                if rate:
                    loss = cropr.loss(cross_entropy, *output, labels[batch])
                else:
                    loss = cross_entropy(output, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                progress.update()
    if rate:
        cropr.set_rate(model, rate)
    return Result(model.eval(), accuracy(model, test_images, test_labels), share)
