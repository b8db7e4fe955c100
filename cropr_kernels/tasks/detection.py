"""Object detection and instance segmentation: a simple feature pyramid into torchvision's Faster or Mask R-CNN.

The backbone keeps its one resolution and all other maps are made from its last one (Li et al. 2022, ViTDet). One query
per patch (of the image, or of a window) in every module; the auxiliary heads say which categories a patch belongs to.
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
from ..utils.optional import need
from .features import patch_features


def patch_categories(
    targets: Sequence[dict[str, Tensor]], num_classes: int, grid: tuple[int, int], patch: tuple[int, int]
) -> Tensor:
    """Which categories touch each patch of a grid: (B, patches, num_classes) float, 1 where one of their objects does.

    Targets are per image boxes (n, 4) as x0, y0, x1, y1 in pixels, labels (n,) from 1, and masks (n, H, W) if there are
    any; an object then is where its mask is, else where its box is.
    """
    whole = []
    for target in targets:
        boxes, labels = target["boxes"], target["labels"] - 1
        if "masks" in target:
            masks = target["masks"].float()
            masks = F.pad(masks, (0, grid[1] * patch[1] - masks.shape[2], 0, grid[0] * patch[0] - masks.shape[1]))
            touched = F.max_pool2d(masks[:, None], patch)[:, 0] > 0
        else:
            touched = boxes_on_grid(boxes, grid, patch)
        one = boxes.new_zeros(num_classes, grid[0] * grid[1])
        whole.append(one.index_add(0, labels, touched.flatten(1).type_as(one)).clamp_max(1).T)
    return torch.stack(whole)


class SimplePyramid(nn.Module):
    """Maps at strides 4, 8, 16, 32 and 64 from one of stride 16, all of `channels`."""

    def __init__(self, dim: int, channels: int = 256):
        super().__init__()
        from torchvision.models.convnext import LayerNorm2d

        def up(source: int) -> nn.Module:
            return nn.ConvTranspose2d(source, source // 2, 2, 2)

        finest = nn.Sequential(up(dim), LayerNorm2d(dim // 2), nn.GELU(), up(dim // 2))
        paths = [(finest, dim // 4), (up(dim), dim // 2), (nn.Identity(), dim), (nn.MaxPool2d(2), dim)]
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
        """Maps (B, channels, ...) by name, "0" (finest) to "3" and "pool", from x (B, D, H, W)."""
        maps = OrderedDict((str(level), make(x)) for level, make in enumerate(self.maps))
        maps["pool"] = F.max_pool2d(maps["3"], 1, 2)
        return maps


class _Float32:
    """Stands before a layer's class: under autocast this layer keeps float32, and those around it do not."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())  # type: ignore[misc, no-any-return]


class _Linear32(_Float32, nn.Linear): ...


class _Conv32(_Float32, nn.Conv2d): ...


def _keep_float32(heads: nn.Module) -> None:
    """What boxes, scores and masks are read from: boxes are pixels, and 16 bits are too few for them."""
    for name, layer in heads.named_modules():
        kept = {nn.Linear: _Linear32, nn.Conv2d: _Conv32}.get(type(layer))
        if kept and name.endswith((".cls_logits", ".cls_score", ".bbox_pred", ".mask_fcn_logits")):
            layer.__class__ = kept


class Detector(nn.Module):
    """A backbone without a head, the pyramid, and torchvision's region proposals and heads.

    Args:
        backbone: of patch size 16, or near it: pruned by `apply` with llf=True, num_outputs = num_classes and one query
            per patch (per patch of a window, with windows), or not pruned.
        num_classes: categories, the background not counted.
        img_size: height and width of the square the network sees; photos are resized to fit, and padded.
        masks: instance segmentation too (Mask R-CNN).
        mean, std: of the pixels, for the backbone.
        channels: of the pyramid.
        options: others of torchvision's FasterRCNN or MaskRCNN, those of its proposals (rpn_...) and of its box head
            (box_...), such as box_batch_size_per_image, the regions of a photo that the heads learn from.

    Raises:
        ValueError: img_size is not square, the backbone's map is not whole, or there is no such option.
        ImportError: torchvision is not installed.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        img_size: tuple[int, int],
        masks: bool = False,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        channels: int = 256,
        **options: Any,
    ):
        super().__init__()
        detection = need("torchvision.models.detection", "train", "Detector")
        if img_size[0] != img_size[1]:
            raise ValueError(f"Detector: img_size must be square, got {img_size[0]} x {img_size[1]}")
        if is_pruned(backbone) and not backbone.cropr.config.llf:
            raise ValueError("Detector: the pyramid needs the full map: cropr.apply(..., llf=True)")
        self.backbone, self.num_classes, self.side = backbone, num_classes, img_size[0]
        self.pyramid = SimplePyramid(backbone.embed_dim, channels)
        kind = detection.MaskRCNN if masks else detection.FasterRCNN
        every = inspect.signature(detection.FasterRCNN).parameters
        fixed = ("rpn_anchor_generator", "box_predictor")  # they fit the pyramid and the classes
        taken = [name for name in every if name.startswith(("rpn_", "box_")) and name not in fixed]
        unknown = sorted(set(options) - set(taken))
        if unknown:
            raise ValueError(f"Detector: no such option {', '.join(unknown)}; options are {', '.join(taken)}")
        sizes = tuple((round(self.side / 1024 * 32 * 2**level),) for level in range(5))
        anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        width = nn.Identity()  # stands for the backbone while torchvision builds the heads behind it
        width.out_channels = channels  # type: ignore[assignment]
        heads = kind(width, num_classes + 1, rpn_anchor_generator=anchors, **options)
        _keep_float32(heads)
        self.rpn, self.roi_heads = heads.rpn, heads.roi_heads
        resize = detection.transform.GeneralizedRCNNTransform
        self.transform = resize(self.side, self.side, list(mean), list(std), size_divisible=self.side)

    def pixels(self, images: Sequence[Tensor]) -> Tensor:
        """What the backbone sees of photos (3, H, W) in [0, 1]: resized, padded and normalised, (B, 3, side, side)."""
        return self.transform(list(images))[0].tensors

    def forward(self, images: Sequence[Tensor], target: Sequence[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training with a target; else what was found.

        Args:
            images: photos (3, H, W) of any size, in [0, 1].
            target: per photo boxes (n, 4) as x0, y0, x1, y1 in pixels, labels (n,) from 1, n may be 0; masks (n, H, W)
                for instance segmentation.

        Returns:
            {"main", "aux"}, scalars; else per photo {"boxes", "labels", "scores"}, and "masks" (n, 1, H, W).
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        learns = self.training and target is not None
        batch, target = self.transform(list(images), [dict(one) for one in target] if target is not None else None)
        patch = self.backbone.patch_embed.patch_size
        grid = self.side // patch[0], self.side // patch[1]
        pixels = batch.tensors[:, :, : grid[0] * patch[0], : grid[1] * patch[1]]
        tokens, aux = patch_features(self.backbone, pixels, predict=learns)
        maps = self.pyramid(tokens.transpose(1, 2).unflatten(2, grid))
        proposals, losses = self.rpn(batch, maps, target)
        found, more = self.roi_heads(maps, proposals, batch.image_sizes, target)
        if not learns:
            return self.transform.postprocess(found, batch.image_sizes, sizes)
        main = sum((losses | more).values())
        total = torch.zeros_like(main)
        if aux and target is not None:
            categories = patch_categories(target, self.num_classes, grid, patch)
            total = sum((F.binary_cross_entropy_with_logits(one.float(), categories) for one in aux), total)
        return {"main": main, "aux": total}
