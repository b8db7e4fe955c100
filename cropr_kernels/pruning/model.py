"""What `apply` mixes into a model: its forward through the pruned stream, on the engine or by the functional ops."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import schedule as schedules
from ..models.adapters import averages_patches, find_adapter, reads_class_token
from ..models.blocks import FusedBlock
from .block_wrapper import Passage, PrunedWithin
from .engine import Graphs, run_stream
from .masks import Masks, level_padding, make_masks
from .merging import Merge
from .state import Departures, Streamed, run_blocks
from .windows import Windows


class Embedded(NamedTuple):
    """Tokens that enter the first block (B, N, D), their rotary table, and P, the first tokens never pruned."""

    x: Tensor
    rope: Tensor | None
    num_prefix: int
    masks: Masks | None = None


class Featured(NamedTuple):
    """Tokens after the last norm, auxiliary predictions, and which of the tokens are padding (B, K), if any can be."""

    x: Tensor
    aux: list[Tensor]
    padding: Tensor | None


class CroprModules(nn.ModuleList):
    """`model.cropr`: the Cropr modules in order, the schedule they follow, whether LLF ends it, how tokens merge."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        schedule: schedules.Bound,
        llf: bool,
        grid: tuple[int, int],
        merging: Merge | None = None,
        windows: Windows | None = None,
    ):
        super().__init__(modules)
        # The blocks taken apart, for attention that weighs tokens: merging and padding; or why they cannot be.
        self.apart: list[FusedBlock] | str = "the model runs its blocks itself"
        self.schedule, self.llf, self.merging, self.windows = schedule, llf, merging, windows
        self.grid = grid  # patches in height and width that schedules are checked against
        self.overridden: list[tuple[Any, str, Any]] = []  # attributes of the model that apply changed, for remove
        # Set by deploy: the blocks as the engine runs them, or why the functional ops run them; graphs, if any.
        self.engine: list[FusedBlock] | str = "for inference: cropr.deploy"
        self.graphs: Graphs | None = None
        self.passage: Passage | None = None  # of models that run their blocks themselves

    def __repr__(self) -> str:
        engine = f"off ({self.engine})" if isinstance(self.engine, str) else "on"
        merge = "" if self.merging is None else f", {self.merging}"
        return super().__repr__().replace("(", f"({self.schedule}, llf={self.llf}{merge}, engine {engine}", 1)


class Pruned:
    """Mixed into a model's class by `apply`: the same forward, through the pruned stream.

    In training the model returns (output, auxiliary predictions), in eval the output alone.
    """

    cropr: CroprModules

    def cropr_features(
        self: Any,
        images: Tensor,
        *,
        whole: bool = True,
        predict: bool | None = None,
        protect: Tensor | None = None,
        padding: Tensor | None = None,
        departures: Departures | None = None,
    ) -> "Featured":
        """Tokens after the last norm and auxiliary predictions (by default empty in eval).

        Where tokens merged, `whole` copies each of them to all the positions that it stands for. With windows it is
        the patches alone, (B, patches, D), and predictions (B, patches, outputs), in order of position.
        """
        predict = self.training if predict is None else predict
        embedded = self.cropr_embed(images, protect=protect, padding=padding)
        x, rope, prefix = embedded[:3]
        stack: CroprModules = self.cropr
        engine, masks = stack.engine, embedded.masks
        aux: list[Tensor] = []
        watched = self.training or predict or departures is not None or _exporting() or _needs_gradient(x)
        if isinstance(engine, str) or watched:
            how = {"predict": predict, "departures": departures}
            x, aux, rows, _, positions = self.cropr_stream(images, embedded=embedded, **how)
            x = self.norm(x)
        else:
            counts = stack.schedule(x.shape[1], len(self.blocks), prefix, stack.llf)
            parts = {"num_prefix": prefix, "llf": stack.llf, "rope": rope, "merge": stack.merging, "masks": masks}
            x, rows, positions = run_stream(engine, stack, counts, x.contiguous(), self.norm, **parts)
        padding = None if masks is None else masks.padding_at(positions)
        if whole and rows is not None and not stack.llf:
            x = torch.ops.cropr.gather(x, rows)
        if stack.windows is not None:
            grid = grid_of(self, images)
            x, aux = stack.windows.join(x, grid), [stack.windows.join(prediction, grid) for prediction in aux]
        return Featured(x, aux, padding)

    def cropr_embed(
        self: Any, images: Tensor, *, protect: Tensor | None = None, padding: Tensor | None = None
    ) -> Embedded:
        """The tokens that enter the first block; with windows one window a row, and no prefix tokens.

        Raises:
            ValueError: a mask does not fit the images, or padding comes with merging, windows, or attention that cannot
                weigh tokens.
        """
        x, rope = find_adapter(self).embed(self, images)
        stack: CroprModules = self.cropr
        windows, prefix, patches = stack.windows, self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens
        if padding is not None:
            _refuse_padding(stack)
        if windows is None:
            return Embedded(x, rope, prefix, make_masks(protect, padding, images.shape[0], patches, prefix))
        masks, grid = make_masks(protect, None, images.shape[0], patches, 0), grid_of(self, images)
        if masks is not None:
            masks = Masks(windows.split(masks.priority.unsqueeze(-1), grid).squeeze(-1), None)
        rope = None if rope is None else windows.rope(rope, grid, images.shape[0])
        return Embedded(windows.split(x[:, prefix:], grid), rope, 0, masks)

    def cropr_stream(
        self: Any,
        images: Tensor,
        *,
        embedded: Embedded | None = None,
        departures: Departures | None = None,
        predict: bool | None = None,
        collect: bool = False,
    ) -> Streamed:
        """The functional stream through the blocks, from images (B, C, H, W) or from what they were embedded to."""
        stack: CroprModules = self.cropr
        x, rope, prefix, masks = self.cropr_embed(images) if embedded is None else embedded
        blocks = self.blocks if stack.windows is None else stack.windows.blocks(self.blocks, grid_of(self, images))
        return run_blocks(
            blocks,
            stack,
            stack.schedule(x.shape[1], len(blocks), prefix, stack.llf),
            x,
            num_prefix=prefix,
            llf=stack.llf,
            rope=rope,
            training=self.training if predict is None else predict,
            recompute=self.training and getattr(self, "grad_checkpointing", False),
            departures=departures,
            merge=stack.merging,
            collect=collect,
            masks=masks,
            apart=() if isinstance(stack.apart, str) else stack.apart,
        )

    def forward_features(self, images: Tensor, protect: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """Tokens after the last norm: those kept, or all in original order with LLF or where tokens merge.

        Masks as in `forward`; what tokens of padding hold means nothing.
        """
        return self.cropr_features(images, protect=protect, padding=padding)[0]

    def forward(
        self: Any, images: Tensor, protect: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The model's output; in training also the auxiliary predictions.

        Args:
            images: (B, C, H, W).
            protect: (B, grid height, grid width) bool: patches that stay while anything else can leave
                (`protect_boxes`). Where more are protected than may stay, their scores decide.
            padding: (B, grid height, grid width) bool: patches that are none (`pad_images`). They leave first, no token
                sees them, and the head does not either. Each image needs a token that is no padding.

        Raises:
            ValueError: a mask does not fit the images, or padding comes with merging, windows, a head that neither
                takes the class token nor averages, or attention that cannot weigh tokens.
        """
        graphs = self.cropr.graphs
        plain = not (self.training or torch.compiler.is_compiling() or _needs_gradient(images))
        if graphs is not None and images.is_cuda and plain:
            masks = {name: mask for name, mask in (("protect", protect), ("padding", padding)) if mask is not None}

            def run(batch: Tensor, *given: Tensor) -> Tensor:
                return self.cropr_output(batch, **dict(zip(masks, given)))[0]

            with torch.no_grad():
                return graphs(run, (images, *masks.values()), (self.cropr_key(images), *masks))
        output, aux = self.cropr_output(images, protect=protect, padding=padding)
        return (output, aux) if self.training else output

    def cropr_output(
        self: Any,
        images: Tensor,
        *,
        predict: bool | None = None,
        protect: Tensor | None = None,
        padding: Tensor | None = None,
        departures: Departures | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The output and the auxiliary predictions: by default those of training, none in eval.

        Raises:
            RuntimeError: with window attention there are no prefix tokens, and no head for images.
            ValueError: as in `forward`.
        """
        if self.cropr.windows is not None:
            raise RuntimeError("with window attention a model gives features only: model.forward_features(images)")
        how = {"predict": predict, "protect": protect, "padding": padding, "departures": departures}
        x, aux, absent = self.cropr_features(images, whole=not reads_class_token(self), **how)
        if absent is not None and not reads_class_token(self):
            if not averages_patches(self):
                raise ValueError(
                    "cropr: padding needs a head that takes the class token or averages over the patches; that of "
                    f"{type(self).__mro__[2].__name__} does neither"
                )
            x = level_padding(x, absent, self.num_prefix_tokens)
        return self.forward_head(x), aux

    def cropr_key(self: Any, images: Tensor) -> tuple[Any, ...]:
        """All that decides what a captured graph computes: shapes, schedule, precision, where the weights are."""
        weight = next(self.parameters())
        device = images.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        placed = (images.shape, images.dtype, images.device, weight.data_ptr(), weight.dtype)
        return *placed, str(self.cropr.schedule), self.cropr.llf, self.cropr.merging, autocast

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("forward_intermediates would run the blocks unpruned; call cropr.remove(model) first")


def _exporting() -> bool:
    """Whether torch.export traces (its default, non-strict way): exported programs hold the functional ops."""
    # Dynamo up to torch 2.11 takes is_exporting() for true in torch.compile as well.
    return not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def _refuse_padding(stack: CroprModules) -> None:
    what = None
    if stack.merging is not None:
        what = "with merge=True: drop tokens instead"
    elif stack.windows is not None:
        what = "with window attention"
    elif isinstance(stack.apart, str):
        what = f"for this model: {stack.apart}"
    if what is not None:
        raise ValueError(f"cropr: padding is not supported {what}")


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def grid_of(model: Any, images: Tensor) -> tuple[int, int]:
    """Patches in height and width that images make."""
    patch = model.patch_embed.patch_size
    return images.shape[2] // patch[0], images.shape[3] // patch[1]


def require_pruned(model: Any, caller: str) -> CroprModules:
    """The modules of a pruned model.

    Raises:
        TypeError: the model is not pruned; the message names the caller.
    """
    if not isinstance(model, Pruned | PrunedWithin):
        raise TypeError(f"{caller}: the model is not pruned; call cropr.apply(model, rate=...) first")
    return model.cropr
