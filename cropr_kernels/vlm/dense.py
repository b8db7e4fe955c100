"""Tokens that a tower pruned by `apply` leaves, marked for the language model."""

import inspect
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..pruning.model import is_pruned, modules_of
from ..pruning.strategies import MergeStrategy
from .features import entries_of, finite_rows

_Output = dict[str, object]  # a ModelOutput of transformers
_PACK = "pack_image_features"  # of models whose images are tiles, which are cut and get newlines


class _Marks(threading.local):
    active = False
    survivors: Tensor | None = None  # (B, N) bool, of the last forward
    # (B, patches), of the last forward, or (rows,) of its tiles packed; 0: pruned
    sizes: Tensor | None = None
    repeats = False  # the marks are those of the last forward


class PrunedTower:
    """A tower pruned by `apply`: in its output, NaN stands for what it pruned.

    Args:
        model: the module that `apply` was given.
        base: the vision-language model without its head.
    """

    def __init__(self, model: nn.Module, base: object):
        self.model = model
        self.marks = _Marks()
        encoder = modules_of(model).spec.encoder
        # After the hooks of `apply` that open the forward, and before those that close it
        self.hooks: list[RemovableHandle] = [
            encoder.register_forward_pre_hook(self._before),
            encoder.register_forward_hook(self._record, prepend=True),
        ]
        if model is not encoder:  # older transformers add hidden states around the encoder
            self.hooks.append(model.register_forward_hook(self._mark))
        if hasattr(base, _PACK):
            setattr(base, _PACK, partial(self._pack, base))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "marks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, marks=_Marks())

    @property
    def fuses(self) -> bool:
        """All tokens are restored before the last block, so that all rows may be chosen."""
        return modules_of(self.model).config.llf is not None

    def features(self, call: Callable[[], Any]) -> tuple[Any, Tensor]:
        """Compute image features with all rows in place, and the size of each row: patches that it
        stands for; 0 if the tower has pruned it.

        NaN in rows that count for nothing would be NaN in gradients of what reads them. So with
        gradients these rows are 0, and NaN marks them in a second pass.
        """
        self.marks.active = True
        try:
            output = marked = call()
            if torch.is_grad_enabled():
                self.marks.repeats = True
                with torch.no_grad():
                    marked = call()
        finally:
            self.marks.active = False
            self.marks.repeats = False
        present = finite_rows(entries_of(marked.pooler_output))
        sizes = self.marks.sizes
        if sizes is None or sizes.numel() != len(present):
            return output, present.float()
        return output, sizes.flatten() * present

    def pooled_features(self, call: Callable[[], Any], side: int) -> tuple[Any, Tensor | None]:
        """Compute image features that pool side x side patches, and the size of each row: patches
        that the survivors among its own stand for."""
        output = call()
        sizes = self.marks.sizes
        if sizes is None:
            return output, None
        patches = math.isqrt(sizes.shape[1])
        grid = sizes.view(-1, patches // side, side, patches // side, side)
        # Rows that only copy others' survivors come last, and still count
        return output, grid.sum((2, 4)).flatten().clamp_min(torch.finfo(torch.float32).tiny)

    def num_kept(self, num_patches: int) -> int:
        """Count the patches of an image that the tower keeps, of `num_patches`."""
        modules = modules_of(self.model)
        prefix = modules.spec.num_prefix
        counts = modules.config.counts(num_patches + prefix, len(modules.spec.blocks), prefix)
        return counts[-1] - prefix

    def remove(self, base: object) -> None:
        """Undo what the constructor has done."""
        for hook in self.hooks:
            hook.remove()
        vars(base).pop(_PACK, None)

    def _pack(
        self, base: object, image_features: Sequence[Tensor], *args: object, **kwargs: object
    ) -> object:
        """Pack the tiles of images as the model does, and their sizes in the same way."""
        pack = getattr(type(base), _PACK)
        sizes = self.marks.sizes
        counts = [len(feature) for feature in image_features]
        lengths = {feature.shape[1] for feature in image_features}
        if (
            self.marks.active
            and not self.marks.repeats
            and sizes is not None
            and sizes.shape == (sum(counts), *lengths)
        ):
            bound = inspect.signature(pack).bind(
                base, sizes.unsqueeze(2).split(counts), *args, **kwargs
            )
            if bound.arguments.get("image_newline") is not None:
                bound.arguments["image_newline"] = sizes.new_ones(1)
            packed, _ = pack(*bound.args, **bound.kwargs)
            self.marks.sizes = torch.cat(list(packed)).squeeze(1)
        return pack(base, image_features, *args, **kwargs)

    def _before(self, encoder: nn.Module, args: object) -> None:
        """Have all tokens restored after the last block."""
        context = modules_of(self.model).context
        if self.marks.active and context.options is not None:
            context.options = context.options._replace(engine=False, restore=True)

    def _record(self, encoder: nn.Module, args: object, output: _Output) -> _Output:
        """Note the survivors of a forward and their sizes, and mark its output."""
        state = modules_of(self.model).context.state
        if state is None:
            self.marks.survivors = self.marks.sizes = None
            return output
        if not self.marks.repeats:
            kept = torch.ones(state.num_images, state.num_tokens, dtype=torch.bool)
            for _, positions in state.pruned_idx:
                kept = kept.to(positions.device).scatter(1, positions, False)
            self.marks.survivors = kept
            sizes = kept.float()
            if isinstance(state.strategy, MergeStrategy) and state.strategy.sizes is not None:
                sizes = sizes.masked_scatter(kept, state.strategy.sizes)
            self.marks.sizes = sizes[:, state.num_prefix :]
        return self._mark(encoder, args, output)

    def _mark(self, module: nn.Module, args: object, output: _Output) -> _Output:
        """Put NaN in place of what the tower has pruned, for gradients 0."""
        if not self.marks.active or self.marks.survivors is None:
            return output
        pruned = ~self.marks.survivors
        if not pruned.any():
            return output
        fill = 0.0 if torch.is_grad_enabled() else float("nan")
        fields = {name: _marked(value, pruned, fill) for name, value in output.items()}
        return type(output)(**fields)


def find_pruned(model: nn.Module) -> nn.Module | None:
    """Find the module inside a model, or the model, that `apply` has pruned."""
    return next((module for module in model.modules() if is_pruned(module)), None)


def _marked(value: object, pruned: Tensor, fill: float) -> object:
    """Put `fill` at the pruned tokens of maps (B, N, D)."""
    if isinstance(value, tuple | list):
        return type(value)(_marked(part, pruned, fill) for part in value)
    if not isinstance(value, Tensor) or value.shape[:2] != pruned.shape:
        return value
    return value.masked_fill(pruned.unsqueeze(-1), fill)
