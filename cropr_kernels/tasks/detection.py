"""Object detection and instance segmentation: a simple feature pyramid into torchvision's Faster or
Mask R-CNN.

The backbone keeps its one resolution and all other maps are made from its last one (Li et al. 2022,
ViTDet). One query per patch (of the image, or of a window) in every module; the auxiliary heads say
which categories a patch belongs to.
"""

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pruning.masks import boxes_on_grid
from ..pruning.model import is_pruned
from ..utils.optional import import_optional
from .backbone import Backbone, Task
from .features import patch_features


def patch_categories(
    targets: Sequence[dict[str, Tensor]],
    num_classes: int,
    grid: tuple[int, int],
    patch: tuple[int, int],
) -> Tensor:
    """Mark the categories of each patch of a grid: (B, patches, num_classes) float, 1 if an object
    touches it.

    Targets are per image boxes (n, 4) as x0, y0, x1, y1 in pixels, labels (n,) from 1, and
    optionally masks (n, H, W), which take precedence over boxes.
    """
    categories = []
    for target in targets:
        boxes, labels = target["boxes"], target["labels"] - 1
        if "masks" in target:
            masks = target["masks"].float()
            masks = F.pad(
                masks,
                (0, grid[1] * patch[1] - masks.shape[2], 0, grid[0] * patch[0] - masks.shape[1]),
            )
            touched = F.max_pool2d(masks[:, None], patch)[:, 0] > 0
        else:
            touched = boxes_on_grid(boxes, grid, patch)
        counts = boxes.new_zeros(num_classes, grid[0] * grid[1])
        counts = counts.index_add(0, labels, touched.flatten(1).type_as(counts))
        categories.append(counts.clamp_max(1).T)
    return torch.stack(categories)


class SimplePyramid(nn.Module):
    """Feature pyramid of strides 4, 8, 16, 32 and 64 from a map of stride 16, with `channels`
    each."""

    def __init__(self, dim: int, channels: int = 256):
        super().__init__()
        from torchvision.models.convnext import LayerNorm2d

        def up(source: int) -> nn.Module:
            return nn.ConvTranspose2d(source, source // 2, 2, 2)

        finest = nn.Sequential(up(dim), LayerNorm2d(dim // 2), nn.GELU(), up(dim // 2))
        paths = [
            (finest, dim // 4),
            (up(dim), dim // 2),
            (nn.Identity(), dim),
            (nn.MaxPool2d(2), dim),
        ]
        self.maps = nn.ModuleList(
            nn.Sequential(
                path,
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for path, width in paths
        )

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """Return maps (B, channels, ...) by name, "0" (finest) to "3" and "pool", of x (B, D, H,
        W)."""
        maps = OrderedDict((str(level), layer(x)) for level, layer in enumerate(self.maps))
        maps["pool"] = F.max_pool2d(maps["3"], 1, 2)
        return maps


class _Float32:
    """Mixin that keeps one layer in float32 under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())  # type: ignore[misc, no-any-return]


class _Linear32(_Float32, nn.Linear): ...


class _Conv32(_Float32, nn.Conv2d): ...


def _keep_float32(heads: nn.Module) -> None:
    """Keep the output layers in float32: boxes are in pixels, which need more than 16 bits."""
    for name, layer in heads.named_modules():
        float32_class = {nn.Linear: _Linear32, nn.Conv2d: _Conv32}.get(type(layer))
        if float32_class and name.endswith(
            (".cls_logits", ".cls_score", ".bbox_pred", ".mask_fcn_logits")
        ):
            layer.__class__ = float32_class


class Detector(Task):
    """A backbone with a feature pyramid, and torchvision's region proposals and heads.

    Args:
        backbone: without a head, of patch size 16 or near it; if pruned by `apply`, with llf=True,
            num_outputs = num_classes, and one query per patch (of a window, with windows).
        num_classes: number of categories, without the background.
        img_size: height and width of the square input; photos are resized to fit, and padded.
        masks: also instance segmentation (Mask R-CNN).
        mean, std: normalization of the pixels.
        channels: of the pyramid.
        options: further options of torchvision's FasterRCNN or MaskRCNN for proposals (rpn_...) and
            box head (box_...), such as box_batch_size_per_image, the sampled regions per photo in
            training.

    Raises:
        ValueError: img_size is not square, the backbone's map is not full, or an option is unknown.
        ImportError: torchvision is not installed.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        img_size: tuple[int, int],
        masks: bool = False,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        channels: int = 256,
        **options: object,
    ):
        super().__init__(backbone)
        detection = import_optional("torchvision.models.detection", "train", "Detector")
        if img_size[0] != img_size[1]:
            raise ValueError(
                f"Detector: img_size must be square, got {img_size[0]} x {img_size[1]}"
            )
        if is_pruned(backbone) and not backbone.cropr.config.llf:
            raise ValueError("Detector: the pyramid needs the full map: cropr.apply(..., llf=True)")
        self.num_classes = num_classes
        self.side = img_size[0]
        self.pyramid = SimplePyramid(backbone.embed_dim, channels)
        detector = detection.MaskRCNN if masks else detection.FasterRCNN
        parameters = inspect.signature(detection.FasterRCNN).parameters
        # Determined by the pyramid and the classes
        fixed = ("rpn_anchor_generator", "box_predictor")
        allowed = [
            name for name in parameters if name.startswith(("rpn_", "box_")) and name not in fixed
        ]
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise ValueError(
                f"Detector: unknown option {', '.join(unknown)}; options are {', '.join(allowed)}"
            )
        sizes = tuple((round(self.side / 1024 * 32 * 2**level),) for level in range(5))
        anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        placeholder = nn.Identity()  # for the backbone, while torchvision builds the heads
        placeholder.out_channels = channels  # type: ignore[assignment]
        heads = detector(placeholder, num_classes + 1, rpn_anchor_generator=anchors, **options)
        _keep_float32(heads)
        self.rpn, self.roi_heads = heads.rpn, heads.roi_heads
        rcnn_transform = detection.transform.GeneralizedRCNNTransform
        self.transform = rcnn_transform(
            self.side, self.side, list(mean), list(std), size_divisible=self.side
        )

    def pixels(self, images: Sequence[Tensor]) -> Tensor:
        """Resize, pad and normalize photos (3, H, W) in [0, 1] for the backbone: (B, 3, side,
        side)."""
        return self.transform(list(images))[0].tensors

    def forward(
        self, images: Sequence[Tensor], target: Sequence[dict[str, Tensor]] | None = None
    ) -> Any:
        """Return losses in training with a target, else detections.

        Args:
            images: photos (3, H, W) of any size, in [0, 1].
            target: per photo boxes (n, 4) as x0, y0, x1, y1 in pixels, labels (n,) from 1, n may be
                0; for instance segmentation masks (n, H, W).

        Returns:
            {"main", "aux"}, scalars; else per photo {"boxes", "labels", "scores"}, and "masks" (n,
            1, H, W).
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        in_training = self.training and target is not None
        copies = None if target is None else [dict(objects) for objects in target]
        batch, target = self.transform(list(images), copies)
        patch = self.backbone.patch_embed.patch_size
        grid = self.side // patch[0], self.side // patch[1]
        pixels = batch.tensors[:, :, : grid[0] * patch[0], : grid[1] * patch[1]]
        tokens, aux = patch_features(self.backbone, pixels, predict=in_training)
        maps = self.pyramid(tokens.transpose(1, 2).unflatten(2, grid))
        proposals, losses = self.rpn(batch, maps, target)
        detections, head_losses = self.roi_heads(maps, proposals, batch.image_sizes, target)
        if not in_training:
            return self.transform.postprocess(detections, batch.image_sizes, sizes)
        main = sum((losses | head_losses).values())
        total = torch.zeros_like(main)
        if aux and target is not None:
            categories = patch_categories(target, self.num_classes, grid, patch)
            total = sum(
                (
                    F.binary_cross_entropy_with_logits(prediction.float(), categories)
                    for prediction in aux
                ),
                total,
            )
        return {"main": main, "aux": total}
