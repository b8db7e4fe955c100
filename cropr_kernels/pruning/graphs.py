"""CUDA graphs of a deployed model: where launches take longer than what they launch, one replay takes their place."""

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from itertools import chain
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..models.adapters import is_hooked

# Unless deploy is told otherwise: patches of a batch up to which a GPU waits for launches (not measured yet), graphs at
# a time, and calls after which one that was not used makes room.
PATCHES, CAPACITY, PATIENCE = 4096, 8, 1000


class CaptureError(RuntimeError):
    """What was called cannot be captured in a CUDA graph."""


class Place:
    """What graphs on the current device share: the stream and the memory they are captured with, so that together they
    hold no more than the largest does, and when the last call is done with that memory."""

    def __init__(self) -> None:
        self.stream, self.pool, self.free = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), torch.cuda.Event()


class Captured:
    """One function in a CUDA graph, with inputs and outputs of its own.

    It is captured without autograd, and replays on the stream that is current on the device of the inputs, whatever
    device the caller is on: each call waits until the one before at that place, on whatever stream, is done.
    """

    last_call = 0

    def __init__(self, run: Callable[..., Any], inputs: tuple[Tensor, ...], place: Place):
        self.place, self.device, kind = place, inputs[0].device, inputs[0].device.type
        # Weights that autocast has cast once would be freed when it ends, or be the graph's own.
        autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad(), autocast:
            self.inputs = tuple(value.clone() for value in inputs)
            place.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(place.stream):  # compiles kernels and fills caches, which capture must not do
                for _ in range(2):
                    run(*self.inputs)
            torch.cuda.current_stream().wait_stream(place.stream)
            self.graph = torch.cuda.CUDAGraph()
            how: Any = {"pool": place.pool, "stream": place.stream, "capture_error_mode": "thread_local"}
            try:  # other threads may allocate meanwhile
                with torch.cuda.graph(self.graph, **how):
                    self.output = run(*self.inputs)
            except RuntimeError as error:
                raise CaptureError(str(error).partition("\n")[0]) from error

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        """The function's result for these inputs, a copy that later calls leave alone."""
        with torch.cuda.device(self.device), torch.no_grad():
            self.place.free.wait()
            for static, value in zip(self.inputs, inputs):
                static.copy_(value)
            self.graph.replay()
            result = tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, self.output)
            self.place.free.record()
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
        self.capacity, self.patience, self.calls = capacity, patience, 0
        self.captured: OrderedDict[Hashable, Captured] = OrderedDict()
        self.places: dict[torch.device, Place] = {}
        self.lock = threading.Lock()

    def __call__(self, run: Callable[..., Any], inputs: tuple[Tensor, ...], key: Hashable) -> Any:
        """run(*inputs), replayed.

        Raises:
            CaptureError: it cannot be captured.
        """
        with self.lock:
            self.calls += 1
            found = self.captured.get(key)
            if found is None:
                found = self.captured[key] = self.capture(run, inputs)
                if len(self.captured) > self.capacity:  # not before capture, which waits for all that runs
                    self.captured.popitem(last=False)
            self.captured.move_to_end(key)
            found.last_call = self.calls
            return found(inputs)

    def has_room(self) -> bool:
        """Whether one more is worth a capture: shapes that take turns would throw each other out at every call."""
        with self.lock:
            self.calls += 1
            oldest = next(iter(self.captured.values()), None)
            full = len(self.captured) >= self.capacity
            return oldest is None or not full or self.calls - oldest.last_call > self.patience

    def capture(self, run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Captured:
        device = inputs[0].device
        if device not in self.places:
            with torch.cuda.device(device):
                self.places[device] = Place()
        return Captured(run, inputs, self.places[device])

    def __reduce__(self) -> tuple[type["Graphs"], tuple[int, int]]:
        # Copies capture anew: graphs belong to the tensors they were captured with.
        return Graphs, (self.capacity, self.patience)


class GraphedForward:
    """The forward of a deployed model, in CUDA graphs where nobody looks at what happens inside.

    Args:
        model: with `model.cropr.graphs`.
        patches: of a batch, the most that is captured.
    """

    def __init__(self, model: Any, patches: float = math.inf):
        self.model, self.patches, self.parts = model, patches, _Parts(model)

    @property
    def forward(self) -> Callable[..., Any]:
        """What takes the place of the model's: as torch.export wants it, a method, with the same signature."""
        own = type(self.model).forward
        return MethodType(wraps(own)(lambda self, *args, **kwargs: self(*args, **kwargs)), self)

    @staticmethod
    def of(model: Any) -> "GraphedForward | None":
        """That of a model, if it has one."""
        found = getattr(vars(model).get("forward"), "__self__", None)
        return found if isinstance(found, GraphedForward) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, own = self.model, type(self.model).forward
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return own(model, *args, **kwargs)
        stack, slot = model.cropr, model.cropr.slot
        options, graphs = slot.options, stack.graphs
        if slot.model is not None and slot.model is not model:  # a replica, which has this attribute too
            return own(slot.model, *args, **kwargs)
        masks = {name: mask for name in ("protect", "padding") if (mask := getattr(options, name, None)) is not None}
        inputs = (*args, *kwargs.values(), *masks.values())
        observed = options is None or options.predict is not None or not options.engine
        if observed or graphs is None or len(args) + len(kwargs) != 1 or not self._takes(inputs):
            return own(model, *args, **kwargs)
        key = self._key(inputs, (*kwargs, *masks))
        if key not in graphs.captured:
            if not graphs.has_room() or any(is_hooked(module) for module in model.modules() if module is not model):
                return own(model, *args, **kwargs)
            self.parts = _Parts(model)
            key = self._key(inputs, (*kwargs, *masks))

        def run(images: Tensor, *given: Tensor) -> Any:
            slot.options = options._replace(**dict(zip(masks, given)))
            return own(model, **dict.fromkeys(kwargs, images)) if kwargs else own(model, images)

        try:
            return graphs(run, inputs, key)
        except CaptureError as error:
            stack.graphs = None
            warnings.warn(f"cropr: the model runs without CUDA graphs, as it cannot be captured: {error}", stacklevel=2)
            return run(*inputs)

    def _takes(self, inputs: tuple[Any, ...]) -> bool:
        """Whether these are plain images and masks on one GPU, few enough, and nobody records what is done to them."""
        images = inputs[0]
        if not all(type(value) is Tensor and value.is_cuda and value.device == images.device for value in inputs):
            return False
        if images.ndim != 4 or images.numel() == 0:
            return False
        return (
            images.numel() // images.shape[1] <= self.patches * math.prod(self.model.cropr.spec.patch_size)
            and not self.model.training
            and not (torch.is_grad_enabled() and images.requires_grad)
            and not torch._C._are_functorch_transforms_active()
            and not torch._C._len_torch_dispatch_stack()
            and not torch.cuda.is_current_stream_capturing()
        )

    def _key(self, inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> tuple[Any, ...]:
        """All that decides what a captured graph computes: inputs, schedule, precision, and what the model holds."""
        kind, backends = inputs[0].device.type, cast(Any, torch.backends)
        return (
            names,
            *((value.shape, value.dtype, value.device) for value in inputs),
            self.model.cropr.config,
            torch.is_grad_enabled(),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            (
                backends.cuda.matmul.fp32_precision,
                backends.cudnn.conv.fp32_precision,
                torch.are_deterministic_algorithms_enabled(),
            ),
            self.parts.now(),
        )


class _Parts:
    """Where a model keeps parameters, buffers, modules, and hooks inside of its forward."""

    def __init__(self, model: torch.nn.Module):
        places = [vars(module) for module in model.modules()]
        hooks = [place[name] for place in places[1:] for name in ("_forward_hooks", "_forward_pre_hooks")]
        others = [place[name] for place in places for name in ("_parameters", "_buffers", "_modules")]
        self.filled, self.empty = list(filter(None, hooks + others)), [one for one in hooks if not one]
        self.tensors = [*model.parameters(), *model.buffers()]

    def now(self) -> "_Held":
        """What is there now."""
        objects = tuple(chain.from_iterable(map(dict.values, self.filled)))
        return _Held(objects, (any(self.empty), *map(id, objects), *map(Tensor.data_ptr, self.tensors)))


class _Held:
    """Objects and their identity; held, so that no others can take their places."""

    def __init__(self, objects: tuple[Any, ...], identity: tuple[int, ...]):
        self.objects, self.identity, self.hash = objects, identity, hash(identity)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.identity == other.identity
