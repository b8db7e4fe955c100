"""Images and videos of a prompt: their inputs, placeholders and features."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .features import VisionLanguageModel, total_rows
from .prompts import placeholder_runs, split_at_both


class Modality(NamedTuple):
    """The names that models of transformers have for one kind of input."""

    name: str
    pixels: str
    token: str  # in the configuration, the id of a placeholder
    getter: str


IMAGE = Modality("image", "pixel_values", "image_token_id", "get_image_features")
VIDEO = Modality("video", "pixel_values_videos", "video_token_id", "get_video_features")
MODALITIES = (IMAGE, VIDEO)


def modalities_of(inputs: Mapping[str, object]) -> list[Modality]:
    """The modalities whose pixels are among the inputs."""
    return [modality for modality in MODALITIES if inputs.get(modality.pixels) is not None]


def visual_features(
    base: VisionLanguageModel, inputs: Mapping[str, object], modality: Modality
) -> Any:
    """Compute the features of a modality as the model itself does; `pooler_output` holds the rows
    that it puts in place of placeholders.

    Raises:
        ValueError: the model's method for videos is of an older transformers.
    """
    getter = getattr(type(base), modality.getter)
    names = inspect.signature(getter).parameters
    if modality.pixels not in names:
        raise ValueError(
            f"cropr: {modality.name}s of {type(base).__name__} are not pruned: "
            f"{modality.getter} of this transformers takes no {modality.pixels}; install a newer "
            "one, or give frames as images"
        )
    arguments = {name: value for name, value in inputs.items() if name in names}
    return getter(base, **arguments, return_dict=True)


def placeholders_of(model: VisionLanguageModel, input_ids: Tensor, modality: Modality) -> Tensor:
    """Tell where the placeholders of a modality are in a prompt (B, L).

    Raises:
        ValueError: videos stand in a prompt as images do.
    """
    mask = input_ids == getattr(model.config, modality.token, -1)
    if modality is VIDEO and not mask.any():
        raise ValueError(
            f"cropr: videos of {type(model).__name__} are not pruned: the prompt has none of its "
            f"own placeholders for them ({modality.token}); give frames as images"
        )
    return mask


def runs_of(
    modality: Modality,
    placeholders: Tensor,
    entries: Sequence[Tensor],
    inputs: Mapping[str, object],
) -> list[int]:
    """Lengths of the images, or of the frames of videos, in a prompt: runs of placeholders (B, L)
    bool within the features of one entry and frame.

    Raises:
        ValueError: there are more or fewer placeholders than rows of features.
    """
    count = int(placeholders.sum())
    if total_rows(entries) != count:
        raise ValueError(
            f"cropr: the prompt has {count} {modality.name} placeholders, the {modality.name}s "
            f"have {total_rows(entries)} tokens; they must be equally many"
        )
    lengths = [len(entry) for entry in entries]
    if modality is VIDEO:
        frames = _num_frames(inputs, len(entries))
        lengths = [part for pair in zip(lengths, frames) for part in _frame_lengths(*pair)]
    return split_at_both(placeholder_runs(placeholders), lengths)


def _num_frames(inputs: Mapping[str, object], num_videos: int) -> list[int]:
    grid = inputs.get("video_grid_thw")
    if isinstance(grid, Tensor):
        return [int(frames) for frames in grid[:, 0]]
    pixels = inputs[VIDEO.pixels]
    frames = pixels.shape[1] if isinstance(pixels, Tensor) and pixels.ndim == 5 else 1
    return [frames] * num_videos


def _frame_lengths(num_rows: int, frames: int) -> list[int]:
    """Rows of each frame, and of what follows on the last (a newline)."""
    each, rest = divmod(num_rows, frames)
    return [each] * frames + [rest] * (rest > 0)
