"""CUDA graphs of a deployed model: one replay in place of launches that take longer than the
kernels."""

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from itertools import chain
from types import MethodType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..models.adapters import is_hooked
from .state import PruningModules

# Defaults of deploy.
PATCHES = 4096  # of a batch, up to which a GPU waits for launches; not yet measured on a GPU
CAPACITY = 8  # graphs at a time
PATIENCE = 1000  # calls after which a graph that was not used makes room


class CaptureError(RuntimeError):
    """A function cannot be captured in a CUDA graph."""


class GraphPool:
    """The stream and memory shared by all graphs on the current device, which together hold what
    the largest needs."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.memory = torch.cuda.graph_pool_handle()
        self.free = torch.cuda.Event()  # recorded when a call is done with the memory


class Captured:
    """One function in a CUDA graph, with its own inputs and outputs.

    It is captured without autograd, and replays on the current stream of the inputs' device,
    whatever device is
    current: each call waits until the previous one with the same pool, on whatever stream, is done.
    """

    last_call = 0

    def __init__(
        self, function: Callable[..., object], inputs: tuple[Tensor, ...], pool: GraphPool
    ):
        self.pool = pool
        self.device = inputs[0].device
        device_type = self.device.type
        # Weights that autocast has cast once would be freed when it ends, or belong to the graph.
        autocast = torch.autocast(
            device_type,
            torch.get_autocast_dtype(device_type),
            enabled=torch.is_autocast_enabled(device_type),
            cache_enabled=False,
        )
        with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad(), autocast:
            self.inputs = tuple(value.clone() for value in inputs)
            pool.stream.wait_stream(torch.cuda.current_stream())
            # Compiles kernels and fills caches, which capture must not do
            with torch.cuda.stream(pool.stream):
                for _ in range(2):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(pool.stream)
            self.graph = torch.cuda.CUDAGraph()
            mode: Any = "thread_local"  # other threads may allocate meanwhile
            try:
                with torch.cuda.graph(
                    self.graph, pool=pool.memory, stream=pool.stream, capture_error_mode=mode
                ):
                    self.output = function(*self.inputs)
            except RuntimeError as error:
                raise CaptureError(str(error).partition("\n")[0]) from error

    def __call__(self, inputs: tuple[Tensor, ...]) -> object:
        """Return a copy of the function's result for these inputs, which later calls leave
        alone."""
        with torch.cuda.device(self.device), torch.no_grad():
            self.pool.free.wait()
            for static, value in zip(self.inputs, inputs):
                static.copy_(value)
            self.graph.replay()
            result = tree_map(
                lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.output
            )
            self.pool.free.record()
        return result


class Graphs:
    """CUDA graphs of one model, captured at the first call for each key.

    Threads take turns: a graph has one set of inputs.

    Args:
        capacity: graphs at a time; the least recently used is dropped first.
        patience: calls for which it must not have been used, for `has_room`.
    """

    def __init__(self, capacity: int, patience: int = 0):
        if capacity < 1:
            raise ValueError(f"Graphs: capacity must be >= 1, got {capacity}")
        self.capacity = capacity
        self.patience = patience
        self.num_calls = 0
        self.captured: OrderedDict[Hashable, Captured] = OrderedDict()
        self.pools: dict[torch.device, GraphPool] = {}
        self.lock = threading.Lock()

    def __call__(
        self, function: Callable[..., object], inputs: tuple[Tensor, ...], key: Hashable
    ) -> object:
        """Replay function(*inputs).

        Raises:
            CaptureError: it cannot be captured.
        """
        with self.lock:
            self.num_calls += 1
            graph = self.captured.get(key)
            if graph is None:
                graph = self.captured[key] = self.capture(function, inputs)
                # Not before capture, which waits for all that runs
                if len(self.captured) > self.capacity:
                    self.captured.popitem(last=False)
            self.captured.move_to_end(key)
            graph.last_call = self.num_calls
            return graph(inputs)

    def has_room(self) -> bool:
        """Tell whether to capture one more: shapes that alternate would evict each other at every
        call."""
        with self.lock:
            self.num_calls += 1
            oldest = next(iter(self.captured.values()), None)
            is_full = len(self.captured) >= self.capacity
            return (
                oldest is None or not is_full or self.num_calls - oldest.last_call > self.patience
            )

    def capture(self, function: Callable[..., object], inputs: tuple[Tensor, ...]) -> Captured:
        device = inputs[0].device
        if device not in self.pools:
            with torch.cuda.device(device):
                self.pools[device] = GraphPool()
        return Captured(function, inputs, self.pools[device])

    def __reduce__(self) -> tuple[type["Graphs"], tuple[int, int]]:
        # Copies capture anew: graphs belong to the tensors they were captured with.
        return Graphs, (self.capacity, self.patience)


class GraphedModules(PruningModules, Protocol):
    """The Cropr modules of a deployed model."""

    graphs: Graphs | None


class GraphedForward:
    """The forward of a deployed model, in CUDA graphs if nobody looks inside.

    Args:
        model: with `model.cropr.graphs`.
        max_patches: of a batch that is captured.
    """

    def __init__(self, model: nn.Module, max_patches: float = math.inf):
        self.model = model
        self.max_patches = max_patches
        self.tensors = ModelTensors(model)

    @property
    def forward(self) -> Callable[..., object]:
        """The method in place of the model's, with its signature, as torch.export needs it."""
        base_forward = type(self.model).forward
        return MethodType(
            wraps(base_forward)(lambda self, *args, **kwargs: self(*args, **kwargs)), self
        )

    @staticmethod
    def of(model: nn.Module) -> "GraphedForward | None":
        """Return that of a model, if it has one."""
        owner = getattr(vars(model).get("forward"), "__self__", None)
        return owner if isinstance(owner, GraphedForward) else None

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        model = self.model
        base_forward = type(model).forward
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return base_forward(model, *args, **kwargs)
        modules: GraphedModules = model.cropr  # type: ignore[assignment]
        context = modules.context
        options = context.options
        graphs = modules.graphs
        # A replica, which has this attribute too
        if context.model is not None and context.model is not model:
            return base_forward(context.model, *args, **kwargs)
        masks = {
            name: mask
            for name in ("protect", "padding")
            if (mask := getattr(options, name, None)) is not None
        }
        inputs = (*args, *kwargs.values(), *masks.values())
        # The caller looks inside
        if options is None or not context.opened_by_hook or not options.engine:
            return base_forward(model, *args, **kwargs)
        if graphs is None or len(args) + len(kwargs) != 1 or not self._takes(inputs):
            return base_forward(model, *args, **kwargs)
        key = self._key(inputs, (*kwargs, *masks))
        if key not in graphs.captured:
            if not graphs.has_room() or any(
                is_hooked(module) for module in model.modules() if module is not model
            ):
                return base_forward(model, *args, **kwargs)
            self.tensors = ModelTensors(model)
            key = self._key(inputs, (*kwargs, *masks))

        def run(images: Tensor, *mask_inputs: Tensor) -> object:
            masked: dict[str, Any] = dict(zip(masks, mask_inputs))
            context.options = options._replace(equal_counts=True, **masked)
            return (
                base_forward(model, **dict.fromkeys(kwargs, images))
                if kwargs
                else base_forward(model, images)
            )

        try:
            return graphs(run, inputs, key)
        except CaptureError as error:
            modules.graphs = None
            warnings.warn(
                f"cropr: the model runs without CUDA graphs, as it cannot be captured: {error}",
                stacklevel=2,
            )
            return run(*inputs)

    def _takes(self, inputs: tuple[Any, ...]) -> bool:
        """Tell whether these are plain images and masks on one GPU, few enough, and nothing records
        operators."""
        images = inputs[0]
        if not all(
            type(value) is Tensor and value.is_cuda and value.device == images.device
            for value in inputs
        ):
            return False
        if images.ndim != 4 or images.numel() == 0:
            return False
        modules: GraphedModules = self.model.cropr  # type: ignore[assignment]
        return (
            images.numel() // images.shape[1]
            <= self.max_patches * math.prod(modules.spec.patch_size)
            and not self.model.training
            and not (torch.is_grad_enabled() and images.requires_grad)
            and not torch._C._are_functorch_transforms_active()
            and not torch._C._len_torch_dispatch_stack()
            and not torch.cuda.is_current_stream_capturing()
        )

    def _key(self, inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> tuple[Hashable, ...]:
        """Everything that decides what a captured graph computes: inputs, schedule, precision, the
        model's tensors."""
        modules: GraphedModules = self.model.cropr  # type: ignore[assignment]
        device_type = inputs[0].device.type
        backends = cast(Any, torch.backends)
        return (
            names,
            *((value.shape, value.dtype, value.device) for value in inputs),
            modules.config,
            torch.is_grad_enabled(),
            torch.get_autocast_dtype(device_type)
            if torch.is_autocast_enabled(device_type)
            else None,
            (
                backends.cuda.matmul.fp32_precision,
                backends.cudnn.conv.fp32_precision,
                torch.are_deterministic_algorithms_enabled(),
            ),
            self.tensors.fingerprint(),
        )


class ModelTensors:
    """The dictionaries in which a model keeps parameters, buffers, modules, and hooks inside of its
    forward."""

    def __init__(self, model: nn.Module):
        attributes: list[dict[str, Any]] = [vars(module) for module in model.modules()]
        hooks: list[dict[object, object]] = []
        for module in attributes[1:]:
            hooks += [module["_forward_hooks"], module["_forward_pre_hooks"]]
        contents: list[dict[object, object]] = []
        for module in attributes:
            contents += [module["_parameters"], module["_buffers"], module["_modules"]]
        self.filled = [mapping for mapping in hooks + contents if mapping]
        self.empty_hooks = [mapping for mapping in hooks if not mapping]
        self.tensors = [*model.parameters(), *model.buffers()]

    def fingerprint(self) -> "ModelFingerprint":
        """The fingerprint of the present contents."""
        objects = tuple(chain.from_iterable(map(dict.values, self.filled)))
        return ModelFingerprint(
            objects, (any(self.empty_hooks), *map(id, objects), *map(Tensor.data_ptr, self.tensors))
        )


class ModelFingerprint:
    """Identity of the objects of a model. It holds them, so that no others can get their ids."""

    def __init__(self, objects: tuple[object, ...], identity: tuple[int, ...]):
        self.objects = objects
        self.identity = identity
        self.hash = hash(identity)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelFingerprint) and self.identity == other.identity
