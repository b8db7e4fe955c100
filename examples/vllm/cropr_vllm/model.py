"""Qwen2.5-VL of vLLM with fewer image tokens: counts by `keep`, true positions."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from cropr_kernels.vlm.choice import Keep, checked_keep, choose, num_kept

NUM_POSITION_CHANNELS = 4  # vLLM appends them to each row of image features


def configured_keep() -> Keep:
    """Read CROPR_KEEP: a count if it has no point, else a share."""
    text = os.environ.get("CROPR_KEEP", "1.0")
    return checked_keep(float(text) if "." in text else int(text))


def configured_query() -> Tensor | None:
    """Read the query (D,) in the file CROPR_QUERY, if there is one."""
    path = os.environ.get("CROPR_QUERY")
    return None if not path else torch.load(path, weights_only=True).float()


class PrunedProcessor(Qwen2_5_VLMultiModalProcessor):
    """Writes as many placeholders as an image keeps."""

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        keep = configured_keep()
        updates = super()._get_prompt_updates(*args, **kwargs)
        return [
            _shortened(update, keep) if update.modality == "image" else update for update in updates
        ]


def _shortened(update: Any, keep: Keep) -> Any:
    def replacement(item: int) -> list[int]:
        placeholders = update.replacement(item)
        return placeholders[: num_kept(keep, len(placeholders))]

    return replace(update, replacement=replacement)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class PrunedQwen2_5_VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Keeps tokens of an image as `cropr.prune_image_tokens` does."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.keep = configured_keep()
        self.image_query = configured_query()
        if not self.is_multimodal_pruning_enabled:
            raise ValueError(
                "cropr_vllm: vLLM recomputes positions only with --video-pruning-rate above 0"
            )

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: tuple[Tensor, ...], image_input: Any
    ) -> tuple[Tensor, ...]:
        """Choose rows after vLLM has appended the 3-D positions that they have."""
        images = super()._postprocess_image_embeds_evs(image_embeds_split, image_input)
        return tuple(self._chosen(rows) for rows in images)

    def _chosen(self, rows: Tensor) -> Tensor:
        features = rows[:, :-NUM_POSITION_CHANNELS]
        return rows[choose(features, num_kept(self.keep, len(rows)), self.image_query)]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Any
    ) -> tuple[Tensor, int]:
        """Positions (3, L) of the shortened prompt: right up to the first image, recomputed after
        it."""
        positions, delta = super().get_mrope_input_positions(input_tokens, mm_features)
        missing = len(input_tokens) - positions.shape[1]
        if missing > 0:
            positions = torch.nn.functional.pad(positions, (0, missing))
        return positions[:, : len(input_tokens)], delta
