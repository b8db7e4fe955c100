"""The training loop: reproducible steps, a log, and checkpoints to resume from."""

import contextlib
import dataclasses
import gc
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from ..calibration import calibrate
from ..pruning.api import set_progress
from ..pruning.model import is_pruned
from ..tasks import Detector, Task
from ..utils.io import require_launcher, write_text
from ..utils.optional import import_optional
from ..utils.progress import Progress, each
from . import build, checkpoint, folder
from .config import Config
from .data import (
    Batch,
    Batches,
    Data,
    Samples,
    load_data,
    make_loader,
    mixing,
    seed_of,
    seeded,
    val_loader,
)
from .evaluate import MAIN, evaluate
from .optim import lr_share, param_groups, progress
from .precision import autocast, measured_amp

# fields of last.pt besides the model
_FIELDS = (
    "config",
    "classes",
    "optimizer",
    "scaler",
    "ema",
    "step",
    "best",
    "totals",
    "bad_in_a_row",
)


class Process(NamedTuple):
    """Rank and device of this process, and the number of processes."""

    rank: int
    world: int
    device: torch.device


@contextlib.contextmanager
def processes(config: Config) -> Iterator[Process]:
    """Join the process group of torchrun, if it started this process, and leave it at the end."""
    device = (
        ("cuda" if torch.cuda.is_available() else "cpu")
        if config.device == "auto"
        else config.device
    )
    joins = "RANK" in os.environ and not dist.is_initialized()
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if joins:
        importlib.import_module(
            "torch.distributed.checkpoint.state_dict"
        )  # if imported later, its defaults hold the group
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        single = not dist.is_initialized()
        yield Process(
            0 if single else dist.get_rank(),
            1 if single else dist.get_world_size(),
            torch.device(device),
        )
    finally:
        if joins:
            # Gloo's threads end with the last reference to the group; at exit they could abort
            # Python.
            gc.collect()  # wrapped models are cyclic
            dist.destroy_process_group()


def train(
    config: Config,
    out: str | Path,
    *,
    data: Data | None = None,
    task: Task | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Train a task, or resume an interrupted run, which does not change its losses.

    Writes into `out`: config.json; metrics.jsonl, one line for every log_steps steps and every
    evaluation; last.pt, to resume from, every save_steps steps and at the end of an epoch; best.pt,
    the best weights. If weights are averaged, both are evaluated: `weights` and `average` are their
    main metrics, `of` names the better one, whose metrics and weights are written. Under torchrun
    all processes share the work; batch_size is their total.

    A pruned, pretrained network starts from calibrated queries (`Config.calibrate`; a `task`
    argument only if calibrate is set). amp="auto" is resolved once per run.

    Args:
        config: the run.
        out: folder to write to. If it holds the same run, it is resumed.
        data: datasets to use instead of those of the configuration.
        task: a task to train instead of the one of the configuration (`cropr_kernels.tasks`).
        show: show progress bars.

    Returns:
        The metrics of the last evaluation.

    Raises:
        ValueError: the folder holds another run, other data, or a checkpoint that is damaged or
            does not fit.
        FileNotFoundError, ImportError: data or a library is missing.
        RuntimeError: the loss stays infinite or NaN, a checkpoint cannot be written, or the folder
            is in use.
    """
    with processes(config) as process:
        return _train(config, Path(out), data, task, process, show)


def _train(
    config: Config, out: Path, data: Data | None, task: Task | None, process: Process, show: bool
) -> dict[str, Any]:
    """Train as one of the processes; a function, so that the model is freed before they part."""
    config = build.resolve_config(config)
    data = load_data(config) if data is None else data
    from_config = task is None
    task = build.task(config, len(data.classes)) if task is None else task
    with folder.locked(out) if process.rank == 0 else contextlib.nullcontext():
        if process.world > 1:
            dist.barrier()  # the other processes read the folder once the first has locked it
        return Run(config, out, data, task, process, show, from_config=from_config).run()


class Run:
    """One training run of one process; from_config: the task was built from the configuration."""

    def __init__(
        self,
        config: Config,
        out: Path,
        data: Data,
        task: Task,
        process: Process,
        show: bool,
        *,
        from_config: bool = False,
    ):
        self.config = config
        self.out = out
        self.data = data
        self.process = process
        self.log = out / "metrics.jsonl"
        self.task = task.to(process.device).train()
        self.writes = process.rank == 0
        self.parent = os.getppid()
        self.show = show and self.writes
        self.steps_an_epoch = (
            len(Batches(len(data.train), config, 0, world=process.world)) // config.accumulate
        )
        self.mix = mixing(config, len(data.classes)) if config.task == "classification" else None
        self.step = 0
        self.bad_in_a_row = 0
        self.best = -math.inf
        self.totals = {"skipped": 0, "not_finite": 0}
        self.last_metrics: dict[str, Any] = {}
        notes: list[str] = []
        resumed = self._claim_folder(notes)
        config = self.config
        photos = config.calibration_photos if from_config else config.calibrate or 0
        if resumed is None and photos and is_pruned(task.backbone):
            self._calibrate(min(photos, len(data.train)), notes)
        self.wrapped = self._share(self.task)
        self.optimizer = torch.optim.AdamW(
            param_groups(self.task, config), lr=config.lr, betas=(0.9, 0.999)
        )
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=config.amp == "float16")
        self.ema: Any = None
        if config.ema:
            average = import_optional("timm.utils", "train", "cropr train").ModelEmaV3
            self.ema = average(self.task, decay=config.ema, use_warmup=True)
        if resumed is not None:
            self._restore(resumed)
        self._truncate_log(keep=resumed is not None)
        for note in notes:
            self._log({"note": note})
            if self.show:
                print(note, file=sys.stderr)

    def _claim_folder(self, notes: list[str]) -> dict[str, Any] | None:
        """Return the checkpoint to resume from, if the folder holds this run, and resolve
        amp=auto."""
        path = self.out / "last.pt"
        state = None
        if path.exists():
            state = checkpoint.load(path, *_FIELDS)
            saved_config = Config.parse(state["config"], path)
            if self.config.amp == "auto":
                self.config = self.config.changed(amp=saved_config.amp)
            differences = self.config.differences(saved_config)
            if differences:
                raise ValueError(
                    f"train: {self.out} holds another run: {'; '.join(differences)}. Use another "
                    "folder"
                )
            folder.require_same(self.out, self.data, state["classes"], state.get("samples", ()))
        elif self.config.amp == "auto":
            measured = [measured_amp(self.process.device)]
            if self.process.world > 1:
                dist.broadcast_object_list(measured)  # from rank 0
            [(amp, reason)] = measured
            self.config = self.config.changed(amp=amp)
            notes.append(f"amp=auto is amp={amp}: {reason}")
        if self.writes:
            write_text(self.out / "config.json", self.config.to_json())
        return state

    def _truncate_log(self, *, keep: bool) -> None:
        """Keep the log up to this step, with its evaluation: later steps are repeated."""
        lines = folder.read_log(self.log) if keep else []
        lines = [line for line in lines if line["step"] <= self.step]
        self.last_metrics = next(
            (line["val"] for line in lines if line["step"] == self.step and "val" in line), {}
        )
        if self.writes:
            write_text(self.log, "".join(json.dumps(line) + "\n" for line in lines))

    def _calibrate(self, count: int, notes: list[str]) -> None:
        """Calibrate queries on training photos, the same in every process."""
        samples = Samples(self.data.train, self.config.seed)
        generator = torch.Generator().manual_seed(self.config.seed)
        order = torch.randperm(len(samples), generator=generator)[:count].split(16)
        parts = each(order, "calibrating", show=self.show)
        photos = ([samples[-1, index].image for index in part.tolist()] for part in parts)
        # A detector normalizes photos itself.
        pixels = self.task.pixels if isinstance(self.task, Detector) else torch.stack
        calibrate(self.task.backbone, map(pixels, photos))
        notes.append(f"queries calibrated on {count} training photos (calibrate=0: random ones)")

    def _share(self, task: nn.Module) -> nn.Module:
        if self.process.world == 1:
            return task
        if self.config.parallel == "ddp":
            ids = [self.process.device.index] if self.process.device.type == "cuda" else None
            return DistributedDataParallel(task, device_ids=ids)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(self.process.device.type, (self.process.world,))
        # Only for torch.compile; DTensor's caches keep the mesh alive
        getattr(mesh, "_pg_registry", {}).clear()
        for block in task.backbone.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        shared: Any = fully_shard(task, mesh=mesh)
        for method in ("predictions", "slide"):  # called in evaluation, which needs full parameters
            if hasattr(task, method):
                register_fsdp_forward_method(shared, method)
        return shared

    def _restore(self, state: Mapping[str, Any]) -> None:
        path = self.out / "last.pt"
        try:
            checkpoint.restore(self.task, self.optimizer, state)
            self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
        except Exception as error:  # torch raises errors of every type
            raise ValueError(f"checkpoint: {path} does not fit this model: {error}") from error
        self.step = state["step"]
        self.best = state["best"]
        self.totals = state["totals"]
        self.bad_in_a_row = state["bad_in_a_row"]

    def _save(self) -> None:
        state = checkpoint.state_of(self.task, self.optimizer)
        state |= {
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        state |= {
            "step": self.step,
            "best": self.best,
            "totals": self.totals,
            "bad_in_a_row": self.bad_in_a_row,
        }
        self._write("last.pt", state)

    def _write(self, name: str, state: dict[str, object]) -> None:
        state |= {"config": self.config.to_json(), "classes": self.data.classes}
        if self.writes:
            checkpoint.save(
                self.out / name, state | {"samples": [len(self.data.train), len(self.data.val)]}
            )

    def _log(self, line: dict[str, object]) -> None:
        position = {"step": self.step, "epoch": round(self.step / self.steps_an_epoch, 4)}
        if self.writes:
            with open(self.log, "a") as file:
                file.write(json.dumps(position | line) + "\n")

    def run(self) -> dict[str, Any]:
        """Train to the end and return the last evaluation, also of a finished run."""
        config = self.config
        process = self.process
        total = config.epochs * self.steps_an_epoch
        count = len(self.data.train)
        if self.step >= total and not self.last_metrics:  # its line is lost
            self._evaluate()
        with Progress("training", total, done=self.step, show=self.show) as progress_bar:
            while self.step < total:
                epoch, first = divmod(self.step, self.steps_an_epoch)
                batches = Batches(
                    count, config, epoch, rank=process.rank, world=process.world, first_step=first
                )
                loader = iter(make_loader(self.data.train, batches, config))
                for _ in range(first, self.steps_an_epoch):
                    require_launcher(self.parent, "train")
                    start = time.perf_counter()
                    losses = self._step(loader)
                    self.step += 1
                    if self.step % config.log_steps == 0 or self.step == 1:
                        throughput = config.batch_size / (time.perf_counter() - start)
                        progress_bar.update(0, f"loss {losses['loss']:.3f}")
                        self._log(losses | self.totals | {"images/s": round(throughput, 2)})
                    progress_bar.update()
                    is_epoch_end = self.step % self.steps_an_epoch == 0
                    if is_epoch_end and (
                        (epoch + 1) % config.eval_epochs == 0 or self.step == total
                    ):
                        self._evaluate()
                    if self.step % config.save_steps == 0 or is_epoch_end:
                        self._save()
        return self.last_metrics

    def _step(self, loader: Iterator[Batch]) -> dict[str, Any]:
        """Update from batch_size images; skipped if the loss or its gradient is not finite."""
        config = self.config
        device = self.process.device
        epoch = self.step / self.steps_an_epoch
        share = lr_share(config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * group["lr_scale"] * share
        if is_pruned(self.task.backbone):
            set_progress(self.task.backbone, progress(config, epoch))
        # loss, main, aux; unreadable samples
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for part in range(config.accumulate):
            images, target, skipped = tree_map_only(
                Tensor, lambda x: x.to(device, non_blocking=True), next(loader)
            )
            with (
                seeded(seed_of(config.seed, self.step, part, self.process.rank)),
                self._synchronized(part),
            ):
                if self.mix is not None:
                    images, target = self.mix(images, target)
                with autocast(config, device):
                    losses = self.wrapped(images, target)
                loss = sum(losses.values()) / config.accumulate
                self.scaler.scale(loss).backward()
            values = [loss * config.accumulate, losses["main"], losses["aux"]]
            sums += torch.stack(
                [value.detach().double() for value in values] + [sums.new_tensor(skipped)]
            )
        if self.process.world > 1:
            dist.all_reduce(sums)
        means = (sums[:3] / (config.accumulate * self.process.world)).tolist()
        self.totals["skipped"] += int(sums[3])
        if math.isfinite(means[0]) and self._clip():
            self.bad_in_a_row = 0
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update(self.task, self.step + 1)
        else:
            self.totals["not_finite"] += 1
            self.bad_in_a_row += 1
            if self.bad_in_a_row >= config.max_bad_steps:
                raise RuntimeError(
                    f"train: the loss or its gradient was not finite in {self.bad_in_a_row} steps "
                    "in a row, the last "
                    f"{self.step} (main {means[1]}, auxiliary {means[2]}, learning rate "
                    f"{config.lr * share:.3g}). Try "
                    "a lower lr, clip_grad, or amp='bfloat16'"
                )
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": means[0], "main": means[1], "aux": means[2], "lr": config.lr * share}

    def _clip(self) -> bool:
        """Clip the norm of the gradient; return whether to apply it. The scaler skips infinite
        float16 ones."""
        if self.scaler.is_enabled() and not self.config.clip_grad:
            return True
        self.scaler.unscale_(self.optimizer)
        norm: Any = nn.utils.clip_grad_norm_(
            self.task.parameters(), self.config.clip_grad or math.inf
        )
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return self.scaler.is_enabled() or bool(norm.isfinite())

    def _synchronized(self, part: int) -> contextlib.AbstractContextManager[Any]:
        """Exchange gradients only with the last part of a step."""
        last = part == self.config.accumulate - 1
        if isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext() if last else self.wrapped.no_sync()
        if self.process.world > 1:
            self.wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def _evaluate(self) -> None:
        """Measure the weights, and their average if there is one; keep the better."""
        config = self.config
        process = self.process
        main = MAIN[config.task]
        tasks: dict[str, Any] = {"weights": self.task} | (
            {} if self.ema is None else {"average": self.ema.module}
        )
        results: dict[str, dict[str, Any]] = {}
        for name, task in tasks.items():
            if is_pruned(task.backbone):
                set_progress(task.backbone, progress(config, self.step / self.steps_an_epoch))
            loader = val_loader(self.data.val, config, rank=process.rank, world=process.world)
            results[name] = evaluate(
                task, loader, config, len(self.data.classes), process.device, self.show
            )
        best = max(results, key=lambda name: results[name][main])
        self.last_metrics = results[best].copy()
        if self.ema is not None:
            self.last_metrics |= {
                "of": best,
                **{name: metrics[main] for name, metrics in results.items()},
            }
        self._log({"val": self.last_metrics})
        if self.last_metrics[main] > self.best:
            self.best = self.last_metrics[main]
            # All processes must gather the weights.
            state = checkpoint.state_of(self.task, self.optimizer) if best == "weights" else {}
            weights = state["model"] if state else self.ema.module.state_dict()
            self._write(
                "best.pt", {"model": weights, "step": self.step, "metrics": self.last_metrics}
            )


def rebuild(out: str | Path) -> tuple[Task, Config, list[str]]:
    """Load the task of a run in eval mode, its configuration and its classes, from best.pt or
    last.pt.

    Raises FileNotFoundError without a checkpoint, and ValueError if it does not fit its
    configuration.
    """
    path = Path(out) / "best.pt"
    if not path.exists():
        path = Path(out) / "last.pt"
    state = checkpoint.load(path, "config", "classes")
    config = dataclasses.replace(Config.parse(state["config"], path), pretrained=False)
    task = build.task(config.changed(weights=""), len(state["classes"]))
    checkpoint.load_model(task, state["model"], path)
    return task.eval(), config, state["classes"]
