"""Batches of patches of images of any size: the inputs of NaFlexViT and SigLIP 2."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class ImagePatches(NamedTuple):
    """The inputs of one image, without padding."""

    inputs: dict[str, Tensor]  # a batch of one, without the mask
    grid: tuple[int, int]  # patches in height and width


@dataclass(frozen=True)
class PatchInputs:
    """The names of a model's inputs if it takes patches (B, N, ...), and its forward without their
    mask."""

    patches: str  # (B, N, ...)
    mask: str  # (B, N): true, or 1, if it is a patch, else padding
    # The row and column of each patch, (B, N, 2), or the patches of each image in height and width,
    # (B, 2)
    places: str
    arguments: tuple[str, ...]  # of the model's forward, in order
    # Called with the model, and the inputs of images of one size by name, without the mask
    run: Callable[..., object]

    def split(self, inputs: Mapping[str, Tensor]) -> list[ImagePatches]:
        """Split a padded batch into its images.

        Raises:
            ValueError: the inputs are not those of the model, or of other shapes.
        """
        names = (self.patches, self.mask, self.places)
        if set(inputs) != set(names):
            raise ValueError(
                f"cropr.forward_images: patches must come as {', '.join(names)}, got "
                f"{', '.join(inputs) or 'none'}"
            )
        patches, mask, places = (inputs[name] for name in names)
        shapes = ((*tuple(mask.shape[:2]), 2), (len(patches), 2))
        if mask.shape != patches.shape[:2] or tuple(places.shape) not in shapes:
            raise ValueError(
                f"cropr.forward_images: {self.patches} must be (B, N, ...), {self.mask} (B, N) and "
                f"{self.places} (B, N, 2) or (B, 2), got {tuple(patches.shape)}, "
                f"{tuple(mask.shape)} and {tuple(places.shape)}"
            )
        by_patch = places.ndim == 3
        exists = mask.bool()
        if not bool(exists.any(1).all()):
            raise ValueError(
                f"cropr.forward_images: each image needs a patch in {self.mask}, got none in image "
                f"{int(exists.any(1).logical_not().nonzero()[0])}"
            )
        hidden = ~exists.unsqueeze(-1)
        grids = (places.masked_fill(hidden, 0).amax(1) + 1) if by_patch else places
        images = []
        for index, (height, width) in enumerate(grids.tolist()):
            at = exists[index]
            place = places[index, at] if by_patch else places[index]
            image = {self.patches: patches[index, at][None], self.places: place[None]}
            images.append(ImagePatches(image, (height, width)))
        return images

    def find(self, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
        """Find the inputs by name among the arguments of a forward, which may be a mapping."""
        values = dict(zip(self.arguments, args)) | dict(kwargs)
        for value in args:
            if isinstance(value, Mapping):
                values |= value
        return {name: values.get(name) for name in (self.patches, self.mask, self.places)}

    def grid_of(self, places: Tensor) -> tuple[int, int] | None:
        """The patches in height and width of images without padding, None if they differ."""
        grids = places.amax(1) + 1 if places.ndim == 3 else places
        height, width = grids[0].tolist()
        return (height, width) if bool((grids == grids[0]).all()) else None
