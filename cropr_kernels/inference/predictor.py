"""The predictor of `cropr infer` as a callable, for every engine that calls Python on a batch."""

import argparse
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.adapters import find_spec
from ..models.outputs import outputs_of, remove_classifier
from ..models.pixels import Pixels
from ..pruning.costs import ImageFlops
from ..pruning.deployment import deploy
from ..pruning.model import CroprModules, modules_of, run
from ..pruning.state import PruningOptions
from ..utils.optional import import_optional
from ..utils.storage import RemotePath, StorageError
from .loading import device_and_dtype, load_with_queries

# Options of loading, pruning and reading photos besides the named ones; those of `cropr infer`
OPTIONS = (
    *("arch", "img_size", "num_classes", "keep", "llf", "merge"),
    *("mean", "std", "crop_pct", "interpolation", "max_pixels"),
)

Results = dict[str, Any]  # arrays by name
_Read = tuple[Tensor | None, str | None]  # pixels, or the reason why there are none


class Predictor:
    """A pruned model as a picklable function of a batch of photos, as `cropr infer` runs it.

    `predictor(photos, names=None)` takes bytes of files, uint8 arrays (height, width, 3), images of
    Pillow or paths, and returns arrays by name with a row per photo: `error`, None or a reason,
    with `classes` and `probabilities` (B, top), or `features` (B, D). Pickles hold settings only;
    the model is loaded at the first call, once a process.

    Args:
        source: the model, as commands name it.
        queries: file of `cropr calibrate`.
        rate: tokens pruned after each block; default that of the queries or the model.
        device: default cuda if there is a GPU (under torchrun that of the process), else cpu.
        dtype: default "bfloat16" on cuda, else "float32".
        batch_size: photos in one forward.
        features: features in place of classes.
        top: classes of each photo.
        threads: threads that decode photos.
        options: arch, img_size, num_classes, keep, llf, merge, mean, std, crop_pct, interpolation,
            max_pixels, as of `cropr infer`.

    Raises:
        TypeError: an option is not known.
        ValueError: batch_size, top or threads is not positive; at the first call that a value does
            not fit, or that there are no queries.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        queries: str | Path | None = None,
        rate: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 32,
        features: bool = False,
        top: int = 5,
        threads: int = 4,
        **options: Any,
    ):
        unknown = options.keys() - set(OPTIONS)
        if unknown:
            raise TypeError(
                f"cropr.Predictor: options must be among {', '.join(OPTIONS)}, got "
                f"{', '.join(sorted(unknown))}"
            )
        for name, value in (("batch_size", batch_size), ("top", top), ("threads", threads)):
            if value < 1:
                raise ValueError(f"cropr.Predictor: {name} must be >= 1, got {value}")
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                f"cropr.Predictor: dtype must be float32, bfloat16 or float16, got {dtype!r}"
            )
        self.batch_size = batch_size
        self.threads = threads
        self._settings = dict.fromkeys(OPTIONS) | options
        self._settings |= {"model": str(source), "queries": queries and Path(queries)}
        self._settings |= {"rate": rate, "device": device, "dtype": dtype}
        self._settings |= {"features": features, "top": top}
        self._loaded: _Loaded | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_loaded": None}

    def __call__(self, photos: Iterable[Any], names: Iterable[str] | None = None) -> Results:
        """Classify or embed photos of any number; None and what cannot be read are rows too.

        Returns `name` as given (with names); `error`, object; and `classes` (B, top) int32 with
        `probabilities` (B, top) float32, or `features` (B, D) float32. Rows with an error hold -1
        and NaN.
        """
        numpy = import_optional("numpy", "infer", "cropr.Predictor")
        parts = [*self.stream(photos)] or [self._loaded_model().results([])]
        parts = [{name: part[name] for name in ("error", *self.columns)} for part in parts]
        results = {name: numpy.concatenate([part[name] for part in parts]) for name in parts[0]}
        if names is None:
            return results
        return {"name": numpy.array([*names], dtype=object), **results}

    def stream(self, photos: Iterable[Any]) -> Iterator[Results]:
        """Yield the results of each `batch_size` photos, in order; the next are read meanwhile.

        Where photos keep different numbers of tokens there is `gflops` too, (B,) float32, 10^9
        multiply-adds of each.

        Raises StorageError if the connection to an object, of which photos are a URL, fails.
        """
        loaded = self._loaded_model()
        pending = iter(photos)
        with ThreadPoolExecutor(self.threads) as threads:

            def start() -> list[Future[_Read]]:
                batch = islice(pending, self.batch_size)
                return [threads.submit(_read, photo, loaded.pixels) for photo in batch]

            next_batch = start()
            while next_batch:
                batch = next_batch
                next_batch = start()
                yield loaded.results([future.result() for future in batch])

    @property
    def summary(self) -> str:
        """Lines for a log: what a file of queries sets, and how photos are read."""
        loaded = self._loaded_model()
        return "\n".join(filter(None, (loaded.note, f"photos: {loaded.pixels}")))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the results for people, besides name and error."""
        return ("classes", "probabilities") if self._loaded_model().top else ("features",)

    def describe(self) -> dict[str, Any]:
        """Return all that results depend on, besides the photos: values for JSON, with hashes of
        weights and queries."""
        return {"model": self._settings["model"], **self._loaded_model().describe()}

    def _loaded_model(self) -> "_Loaded":
        if self._loaded is None:
            paths = (self._settings["model"], self._settings["queries"])
            stamps = [_stamp(Path(path)) for path in paths if path]
            key = tuple((name, _hashable(name, value)) for name, value in self._settings.items())
            self._loaded = _load(key, tuple(stamps))
        return self._loaded


class _Forward(NamedTuple):
    """The result of a batch of photos."""

    output: Tensor  # (B, classes) or (B, D) float32
    gflops: Tensor | None  # (B,), if photos keep different numbers of tokens


@dataclass
class _Loaded:
    """A deployed model, and how it reads photos; top = 0 for features."""

    model: nn.Module
    pixels: Pixels
    note: str
    device: torch.device
    dtype: torch.dtype
    top: int

    @torch.inference_mode()
    def results(self, reads: list[_Read]) -> Results:
        """Return the results of photos that were read, as `Predictor.__call__` does."""
        numpy = import_optional("numpy", "infer", "cropr.Predictor")
        errors = numpy.array([error for _, error in reads], dtype=object)
        photos = [photo for photo, _ in reads if photo is not None]
        forward = self._forward(torch.stack(photos)) if photos else self._no_output
        output = forward.output
        finite = output.isfinite().all(1).numpy()
        readable = numpy.flatnonzero(numpy.equal(errors, None))
        errors[readable[~finite]] = "the model's output is not finite"
        values: dict[str, tuple[Tensor, Any]] = {"features": (output, numpy.nan)}
        results = {"error": errors}
        if forward.gflops is not None:
            results["gflops"] = numpy.full(len(reads), numpy.nan, numpy.float32)
            results["gflops"][readable] = forward.gflops.numpy()
        if self.top:
            best = output.softmax(1).topk(min(self.top, output.shape[1]))
            values = {
                "classes": (best.indices.int(), -1),
                "probabilities": (best.values, numpy.nan),
            }
        for name, (rows, missing) in values.items():
            array = rows.numpy()
            results[name] = numpy.full((len(reads), rows.shape[1]), missing, array.dtype)
            results[name][readable[finite]] = array[finite]
        return results

    def _forward(self, photos: Tensor) -> _Forward:
        pixels = self.pixels.normalize(photos).to(self.device, self.dtype)
        if not modules_of(self.model).has_counts_by_image:
            return _Forward(outputs_of(self.model(pixels)).float().cpu(), None)
        output, state = run(self.model, lambda: self.model(pixels), PruningOptions(engine=True))
        gflops = self._flops(state) / 2e9
        return _Forward(outputs_of(output).float().cpu(), gflops.float().cpu())

    @functools.cached_property
    def _flops(self) -> ImageFlops:
        image = torch.zeros(1, 3, *self.pixels.img_size, device=self.device, dtype=self.dtype)
        return ImageFlops(self.model, image)

    @functools.cached_property
    def _no_output(self) -> _Forward:
        """An output without rows, as wide as others."""
        output, gflops = self._forward(torch.zeros(1, 3, *self.pixels.img_size))
        return _Forward(output[:0], None if gflops is None else gflops[:0])

    def describe(self) -> dict[str, Any]:
        modules: CroprModules = self.model.cropr  # type: ignore[assignment]
        state = self.model.state_dict().items()
        num_queries = len(modules) if modules.config.schedule.rate != 0 else 0
        return {
            "weights": _digest(value for name, value in state if not name.startswith("cropr.")),
            "schedule": str(modules.config.schedule),
            "llf": str(modules.config.llf),
            "merge": str(modules.config.merge),
            "thresholds": str(modules.thresholds if modules.has_counts_by_image else None),
            "queries": _digest(modules.scorer(layer).query() for layer in range(num_queries)),
            "pixels": str(tuple(self.pixels)),
            "top": self.top,
            "dtype": str(self.dtype),
        }


@functools.lru_cache(maxsize=4)
def _load(key: tuple[tuple[str, Any], ...], stamps: tuple[Any, ...]) -> _Loaded:
    """Load the model of settings, once for all predictors of this process that are alike; stamps
    tell files that have changed."""
    settings = argparse.Namespace(**dict(key))
    device, dtype = device_and_dtype(settings)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    model, pixels, _, note = load_with_queries(settings, announce=False)
    classifies = find_spec(model).num_classes > 0
    if settings.features and classifies:
        remove_classifier(model)
    prunes = model.cropr.config.schedule.rate != 0  # unpruned, the functional ops are bit-exact
    top = settings.top if classifies and not settings.features else 0
    deployed = deploy(model.to(device, dtype), engine=prunes)
    return _Loaded(deployed, pixels, note, device, dtype, top)


def _read(photo: Any, pixels: Pixels) -> _Read:
    try:
        if photo is None:
            raise OSError("no image in this sample")
        return pixels.load(photo.read_bytes() if isinstance(photo, RemotePath) else photo), None
    except StorageError:
        raise
    except OSError as error:
        return None, str(error)


def _stamp(path: Path) -> tuple[object, ...]:
    """Times and sizes of a file, or of the files in a folder; nothing for a model's name."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def _hashable(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        raise TypeError(f"cropr.Predictor: {name} must be a plain value or a list, got {value!r}")
    return tuple(value) if isinstance(value, list) else value


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
