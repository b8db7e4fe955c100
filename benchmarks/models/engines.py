"""Engines of `cropr infer`, interleaved: start, images a second, CPU time, memory from few to many
photos.

python -m benchmarks.models.engines [--photos 2000] [--growth 1000 2000 4000 8000 16000]
    [--rounds 3] [--out benchmarks/results/engines.json]

Times whole commands, each in an empty folder, on photos of 96 pixels and a ViT-Ti at 64 pixels with
random weights, with one thread a process: so little work a photo that an engine's overhead shows.
A start ends with the first part, of 250 photos; images a second are those of the parts after it, or
after the first of each worker. CPU seconds, sampled, and the highest memory are sums over the
processes of a command, shared pages divided among them. All engines must write the same rows. Needs
the extra `ray`.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import cropr_kernels as cropr
from benchmarks.utils.results import RESULTS, ROOT, Results, Row, environment
from cropr_kernels.utils.optional import import_optional

CLI = [sys.executable, "-m", "cropr_kernels.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
RAY = ["--engine", "ray", "--actors"]
ENGINES: dict[str, tuple[list[str], list[str]]] = {  # command, options
    "plain": (CLI, []),
    "torchrun, 2 processes": ([*TORCHRUN, "-m", "cropr_kernels.cli"], []),
    "Ray, 1 actor": (CLI, [*RAY, "1"]),
    "Ray, 2 actors": (CLI, [*RAY, "2"]),
}
UNIT = 250  # photos in a part
GROWS = ("plain", "Ray, 1 actor")


def write_photos(folder: Path, count: int) -> Path:
    """Write photos of 96 pixels, rotated so that all differ."""
    image = import_optional("PIL.Image", "viz", "photos")
    folder.mkdir()
    shrunk = []
    for path in sorted((ROOT / "examples" / "photos").glob("*.jpg")):
        with image.open(path) as photo:
            shrunk.append(photo.convert("RGB").resize((96, 96)))
    for index, photo in zip(range(count), itertools.cycle(shrunk)):
        photo.rotate(index % 360).save(folder / f"{index:05d}.jpg")
    return folder


def watch(process: subprocess.Popen[str], start: float) -> Row:
    """Wait for a command; return its seconds, the CPU seconds of its processes, and their highest
    memory in MiB."""
    psutil = import_optional("psutil", "ray", "memory")
    highest = 0
    cpu: dict[int, float] = {}  # by process, as it was last seen
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        for child in [parent, *children(parent, psutil)]:
            try:
                total += child.memory_full_info().pss
                cpu[child.pid] = sum(child.cpu_times()[:2])
            except psutil.Error:  # it ends just now
                continue
        highest = max(highest, total)
        time.sleep(0.5)
    seconds = round(time.perf_counter() - start, 2)
    return {"seconds": seconds, "CPU": round(sum(cpu.values()), 1), "MiB": highest >> 20}


def children(parent: Any, psutil: Any) -> list[Any]:
    try:
        return parent.children(recursive=True)
    except psutil.Error:
        return []


def throughput(out: Path, workers: int, started: float) -> dict[str, float]:
    """Return the start and the images a second by the times of the parts."""
    times = sorted(part.stat().st_mtime for part in out.glob("part-*.parquet"))
    photos = UNIT * (len(times) - workers)
    return {
        "start": round(times[0] - started, 2),
        "images/s": round(photos / (times[-1] - times[0]), 1),
    }


def measure(engine: str, model: Path, photos: Path, scratch: Path) -> tuple[Row, Any]:
    """Run an engine on a folder; return what it took, and the rows."""
    dataset = import_optional("pyarrow.dataset", "infer", "rows")
    launcher, options = ENGINES[engine]
    settings = ["--unit", str(UNIT), "--workers", "1", "--quiet"]
    variables = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "PYTHONWARNINGS": "ignore"}
    variables |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}  # a cluster of its own
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        command = [*launcher, "infer", str(model), str(photos), "--out", f"{out}/results"]
        start = time.perf_counter()
        started = time.time()
        with subprocess.Popen(
            [*command, *settings, *options],
            env=os.environ | variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            row = watch(process, start)
        if process.returncode:
            raise RuntimeError(f"{engine} failed: {' '.join([*command, *settings, *options])}")
        table = dataset.dataset(f"{out}/results", format="parquet").to_table()
        row |= throughput(Path(out) / "results", 1 + ("2" in engine), started)
    return row, table.sort_by("name").drop_columns("source")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--growth", type=int, nargs="*", default=[1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "engines.json")
    options = parser.parse_args()
    keys = ("engine", "photos", "round")
    results = Results(options.out, environment("cpu") | {"threads": 1}, keys=keys)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        plain = cropr.create_vit("vit_tiny_patch16_224", img_size=64)
        cropr.save(cropr.apply(plain, rate=1, num_outputs=0), scratch / "model")
        cells = [
            (engine, options.photos, index) for index in range(options.rounds) for engine in ENGINES
        ]
        cells += [(engine, count, -1) for count in options.growth for engine in GROWS]
        expected: dict[int, Any] = {}
        for engine, count, index in results.remaining(cells):
            photos = scratch / f"{count}"
            if not photos.exists():
                write_photos(photos, count)
            measured, rows = measure(engine, scratch / "model", photos, scratch)
            if not rows.equals(expected.setdefault(count, rows)) or len(rows) != count:
                raise RuntimeError(f"{engine} writes other rows than the first engine")
            row = {"engine": engine, "photos": count, "round": index, **measured}
            results.add(row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
