"""Whole networks: the engine against everything it should beat, in one run. A file after every cell.

python benchmarks/networks.py [--models vit_large_patch16_224 ...] [--batches 1 8 64 256] [--modes eager graph compiled]
    [--minutes 9] [--out FILE]

Methods: the unpruned model on the same engine, the engine, the functional ops, merging, ToMe, the published sequence,
random pruning, a free slice (drops tokens at no cost: the oracle), the plain model, and timm's where timm has it.
A run that stops at its minutes goes on where it stopped when started again. Weights are random; every cell is checked
first.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, name_of, published, quantile, save
from rivals import SYSTEMS, Reduced
from rivals.stands import Random, Stand
from torch import Tensor

import cropr_kernels as cropr
from cropr_kernels.pruning.engine import Graphs

# image size, rate, Last Layer Fusion; ViT-L and EVA-02-L at 512 px as in the paper
MODELS: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "vit_small_patch16_224": ("vit_small_patch16_224", {}, 8, False),
    "vit_base_patch16_224": ("vit_base_patch16_224", {}, 8, False),
    "vit_large_patch16_224": ("vit_large_patch16_224", {}, 8, False),
    "vit_large_patch16_384": ("vit_large_patch16_384", {}, 24, False),
    "eva02_large_patch14_448": ("eva02_large_patch14_448", {}, 40, True),
    "eva02_large_patch16_512": ("eva02_large_patch14_448", {"patch_size": 16, "img_size": 512}, 40, True),
    "vit_base_patch16_1536": ("vit_base_patch16_224", {"img_size": 1536}, 700, True),
}
Method = Callable[[Tensor], Tensor]


class Published(Stand):
    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        return cropr.Split(*published(x, self.folded.to(x.dtype).unsqueeze(0), num_keep))


class FreeSlice(Stand):
    def forward(self, x: Tensor, num_keep: int, num_prefix: int = 0, *_: Any) -> cropr.Split:
        idx = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return cropr.Split(x[:, :num_keep], idx[:, :num_keep], x[:, num_keep:], idx[:, num_keep:])


def deploy(model: Any, plain: Any, **options: Any) -> Any:
    """For inference, with the weights of `plain` where they are: whoever has its own finds them colder in the cache."""
    deployed = cropr.deploy(model, **options)
    shared = dict(plain.named_parameters())
    for name, module in deployed.named_modules():
        for key in list(module._parameters):
            own = shared.get(f"{name}.{key}" if name else key)
            if own is not None:
                module._parameters[key] = own
    return deployed


def with_stands(model: Any, plain: Any, kind: type[Stand]) -> Any:
    """The deployed model on the functional ops, with other modules in place of Cropr's."""
    other = deploy(model, plain, engine=False)
    for i, module in enumerate(other.cropr):
        other.cropr[i] = kind(module.query())
    return other


def queries_of(deployed: Any) -> dict[str, Tensor]:
    """The queries of a deployed model as a model's before deployment."""
    return {f"{i}.queries": module.query().unsqueeze(0) for i, module in enumerate(deployed.cropr)}


def build(name: str, device: str, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """Every method of one network, and one image."""
    preset, changes, rate, llf = MODELS[name]
    torch.manual_seed(0)
    plain = cropr.create_vit(preset, **changes).eval().requires_grad_(False).to(device, dtype)
    unpruned = deploy(cropr.apply(copy.deepcopy(plain), rate=0), plain)
    engine = deploy(cropr.apply(copy.deepcopy(plain), rate=rate, llf=llf), plain)
    methods = {"unpruned": unpruned, "engine": engine, "functional": deploy(engine, plain, engine=False)}
    merging = cropr.apply(copy.deepcopy(plain), rate=rate, llf=llf, merge=True, num_outputs=0)
    merging.cropr.load_state_dict(queries_of(engine))
    methods["merge"] = deploy(merging, plain)
    if not (llf or plain.config.rope):
        tokens = plain.num_prefix_tokens + plain.grid**2
        counts = cropr.schedule.rate(tokens, len(plain.blocks), rate, plain.num_prefix_tokens)
        methods["ToMe"] = Reduced(plain, SYSTEMS["ToMe"], counts)
    stands = {"published": Published, "random": Random, "free slice": FreeSlice}
    methods |= {name: with_stands(engine, plain, kind) for name, kind in stands.items()} | {"plain": plain}
    size = plain.config.img_size
    try:
        import timm

        if not changes and timm.is_model(name):
            methods["timm"] = timm.create_model(name).eval().requires_grad_(False).to(device, dtype)
    except ImportError:
        pass
    return methods, torch.randn(1, 3, size, size, device=device, dtype=dtype)


def check(methods: dict[str, Any], images: Tensor) -> None:
    """Refuse to time a wrong result.

    Raises:
        RuntimeError: the engine does not compute what the functional ops compute.
    """
    tolerance = 1e-3 if images.dtype == torch.float32 else 0.1
    for one, other in (("unpruned", "plain"), ("engine", "functional")):
        if other not in methods:
            continue
        got, expected = methods[one](images).float(), methods[other](images).float()
        error = ((got - expected).norm() / expected.norm()).item()
        if not error < tolerance:
            raise RuntimeError(f"{one} differs from {other} by {error:.1e} of its norm")
    if "merge" in methods and images.dtype == torch.float32:  # in 16 bits a near-tie may send the two apart
        got, expected = methods["merge"](images), cropr.deploy(methods["merge"], engine=False)(images)
        error = ((got - expected).norm() / expected.norm()).item()
        if not error < tolerance:
            raise RuntimeError(f"merge differs from its functional form by {error:.1e} of its norm")


def in_mode(model: Any, mode: str, images: Tensor) -> Method:
    if mode == "compiled":
        torch._dynamo.reset()
        return torch.compile(model, fullgraph=True)
    if mode == "graph":
        graphs = Graphs(1)
        return lambda batch: graphs(model, (batch,), images.shape)
    return model


def seconds_of(method: Method, images: Tensor, calls: int) -> float:
    """Mean of so many calls back to back: by events on a GPU, where eager launches count as they come."""
    if not images.is_cuda:
        start = time.perf_counter()
        for _ in range(calls):
            method(images)
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        method(images)
    last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last) / calls


def launches(method: Method, images: Tensor) -> int:
    """CUDA kernels of one call, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        method(images)
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.self_device_time_total > 0)


@torch.inference_mode()
def measure(methods: dict[str, Any], images: Tensor, mode: str, rounds: int) -> dict[str, Any]:
    check(methods, images)
    row: dict[str, Any] = {}
    ready: dict[str, Method] = {}
    for name, model in methods.items():
        try:
            ready[name] = in_mode(model, mode, images)
            if images.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            ready[name](images)
            if images.is_cuda:
                row[f"{name}, peak MiB"] = torch.cuda.max_memory_allocated() >> 20
                if mode == "eager":
                    row[f"{name}, kernels"] = launches(ready[name], images)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:  # recorded, not hidden
            ready.pop(name, None)
            row[f"{name}: error"] = str(error).splitlines()[0][:200]
    once = max(seconds_of(method, images, 1) for method in ready.values())
    calls = max(1, min(20, int(0.02 / once)))
    times: dict[str, list[float]] = {name: [] for name in ready}
    order, shuffler = list(ready), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            times[name].append(seconds_of(ready[name], images, calls))
    median = {name: quantile(values, 0.5) for name, values in times.items()}
    if images.is_cuda:  # absolute times from a GPU only
        for name, values in times.items():
            row[f"{name}, ms"] = round(1e3 * median[name], 4)
            row[f"{name}, ms p10 p90"] = [round(1e3 * quantile(values, q), 4) for q in (0.1, 0.9)]
            row[f"{name}, images/s"] = round(len(images) / median[name], 1)
    for name, value in median.items():
        row[f"unpruned / {name}"] = round(median["unpruned"] / value, 4)
    if {"engine", "free slice"} <= set(median):
        row["free slice / engine"] = round(median["free slice"] / median["engine"], 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--modes", nargs="+", choices=["eager", "graph", "compiled"], default=["eager", "graph"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16"])
    parser.add_argument("--methods", nargs="+", help="only these, beside unpruned (default: all there are)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no cell after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or RESULTS / f"{options.device}_networks.json"
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    done = {(row["model"], row["dtype"], row["batch"], row["mode"]) for row in rows}
    started, env = time.monotonic(), environment(options.device)
    for name in options.models:
        for dtype in options.dtypes:
            built = None
            for batch in options.batches:
                for mode in options.modes:
                    if (name, dtype, batch, mode) in done or (mode == "graph" and options.device == "cpu"):
                        continue
                    if time.monotonic() - started > 60 * options.minutes:
                        print("out of minutes: start again to go on")
                        return
                    built = built or build(name, options.device, getattr(torch, dtype))
                    methods, image = built
                    if options.methods:
                        methods = {
                            key: model for key, model in methods.items() if key in ("unpruned", *options.methods)
                        }
                    row: dict[str, Any] = {"model": name, "dtype": name_of(image.dtype), "batch": batch, "mode": mode}
                    row |= {"rate": MODELS[name][2], "llf": MODELS[name][3]}
                    try:
                        row |= measure(methods, image.repeat(batch, 1, 1, 1), mode, options.rounds)
                    except torch.OutOfMemoryError as error:
                        row["error"] = str(error).splitlines()[0]
                    rows.append(row)
                    save(out, env, rows)
                    shown = {key: value for key, value in row.items() if " / " in key or "error" in key}
                    print(name, dtype, batch, mode, shown, flush=True)


if __name__ == "__main__":
    main()
