"""The training loop: steps that can be repeated exactly, a log of them, checkpoints to resume from."""

import contextlib
import dataclasses
import gc
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
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
from ..utils.io import require_launcher, write_text
from ..utils.optional import import_optional
from ..utils.progress import Progress, each
from . import build, checkpoint, folder
from .config import Config
from .data import Batches, Data, Samples, load_data, make_loader, mixing, seed_of, seeded, val_loader
from .evaluate import MAIN, evaluate
from .optim import lr_share, param_groups, progress
from .precision import autocast, measured_amp

# what last.pt holds beside the model
_FIELDS = ("config", "classes", "optimizer", "scaler", "ema", "step", "best", "totals", "bad_in_a_row")


class Place(NamedTuple):
    """This process among all."""

    rank: int
    world: int
    device: torch.device


@contextlib.contextmanager
def processes(config: Config) -> Iterator[Place]:
    """Join the processes that torchrun started, if it did; leave them at the end."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    ours = "RANK" in os.environ and not dist.is_initialized()
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        kind = f"cuda:{os.environ['LOCAL_RANK']}"
    if ours:
        importlib.import_module(
            "torch.distributed.checkpoint.state_dict"
        )  # imported later, its defaults hold the group
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    try:
        alone = not dist.is_initialized()
        yield Place(0 if alone else dist.get_rank(), 1 if alone else dist.get_world_size(), torch.device(kind))
    finally:
        if ours:
            # Gloo's threads end with the last reference to the group; one that wants the GIL as Python exits aborts it.
            gc.collect()  # wrapped models refer to themselves
            dist.destroy_process_group()


def train(
    config: Config, out: str | Path, *, data: Data | None = None, task: Any = None, show: bool = True
) -> dict[str, Any]:
    """Train a task, or resume a run that was interrupted, to the same losses as without the interruption.

    Writes into `out`: config.json; metrics.jsonl, one line for every log_steps steps and every evaluation; last.pt, to
    resume from, every save_steps steps and at the end of an epoch; best.pt, the best weights so far. Where the weights
    are averaged both are evaluated: `weights` and `average` are what they reach, `of` the better one, whose metrics and
    weights those written are. Under torchrun all processes share the work; batch_size is that of all together.

    A pretrained network that is pruned starts from calibrated queries (`Config.calibrate`; a `task` that is given only
    where calibrate says so). amp="auto" is decided once, and is the run's from then on.

    Args:
        config: the run.
        out: folder to write to. If it holds a run, that one resumes; it must be the same one.
        data: datasets to use instead of those that the configuration names.
        task: a network to train instead of the one that the configuration describes (`cropr_kernels.tasks`).
        show: whether to show progress bars.

    Returns:
        The metrics of the last evaluation.

    Raises:
        ValueError: the folder holds another run, or one on other data, or a checkpoint that is damaged or does not fit.
        FileNotFoundError, ImportError: data or a library is missing.
        RuntimeError: the loss stays infinite or NaN, a checkpoint cannot be written, or another process writes there.
    """
    with processes(config) as place:
        return _train(config, Path(out), data, task, place, show)


def _train(config: Config, out: Path, data: Data | None, task: Any, place: Place, show: bool) -> dict[str, Any]:
    """What `train` does as one of the processes; apart, so that the model is let go before they part."""
    config = build.settled(config)
    data = load_data(config) if data is None else data
    made = task is None
    task = build.task(config, len(data.classes)) if made else task
    with folder.locked(out) if place.rank == 0 else contextlib.nullcontext():
        if place.world > 1:
            dist.barrier()  # the others read the folder when the first has it
        return Run(config, out, data, task, place, show, made=made).go()


class Run:
    """One training run of one process; `made`: of the task that the configuration describes."""

    def __init__(
        self, config: Config, out: Path, data: Data, task: Any, place: Place, show: bool, *, made: bool = False
    ):
        self.config, self.out, self.data, self.place, self.log = config, out, data, place, out / "metrics.jsonl"
        self.task = task.to(place.device).train()
        self.writes, self.parent = place.rank == 0, os.getppid()
        self.show = show and self.writes
        self.steps_an_epoch = len(Batches(len(data.train), config, 0, world=place.world)) // config.accumulate
        self.mix = mixing(config, len(data.classes)) if config.task == "classification" else None
        self.step, self.bad_in_a_row, self.best = 0, 0, -math.inf
        self.totals = {"skipped": 0, "not_finite": 0}
        self.last_metrics: dict[str, Any] = {}
        notes: list[str] = []
        resumed = self._claim_folder(notes)
        config = self.config
        photos = config.calibration_photos if made else config.calibrate or 0
        if resumed is None and photos and is_pruned(task.backbone):
            self._calibrate(min(photos, len(data.train)), notes)
        self.wrapped = self._share(self.task)
        self.optimizer = torch.optim.AdamW(param_groups(self.task, config), lr=config.lr, betas=(0.9, 0.999))
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.amp == "float16")
        self.ema: Any = None
        if config.ema:
            average = import_optional("timm.utils", "train", "cropr train").ModelEmaV3
            self.ema = average(self.task, decay=config.ema, use_warmup=True)
        if resumed is not None:
            self._restore(resumed)
        self._cut_log(new=resumed is None)
        for note in notes:
            self._log({"note": note})
            if self.show:
                print(note, file=sys.stderr)

    def _claim_folder(self, notes: list[str]) -> dict[str, Any] | None:
        """The checkpoint to resume from, if the folder holds this run; where amp is auto, settle it."""
        last, found = self.out / "last.pt", None
        if last.exists():
            found = checkpoint.load(last, *_FIELDS)
            before = Config.parse(found["config"], last)
            if self.config.amp == "auto":
                self.config = self.config.changed(amp=before.amp)
            differences = self.config.differences(before)
            if differences:
                raise ValueError(f"train: {self.out} holds another run: {'; '.join(differences)}. Use another folder")
            folder.require_same(self.out, self.data, found["classes"], found.get("samples", ()))
        elif self.config.amp == "auto":
            verdict = [measured_amp(self.place.device)]
            if self.place.world > 1:
                dist.broadcast_object_list(verdict)  # that of the first
            [(amp, reason)] = verdict
            self.config = self.config.changed(amp=amp)
            notes.append(f"amp=auto is amp={amp}: {reason}")
        if self.writes:
            write_text(self.out / "config.json", self.config.to_json())
        return found

    def _cut_log(self, *, new: bool) -> None:
        """Keep the log up to this step, and its evaluation: what was logged after the checkpoint will be again."""
        lines = [] if new else [line for line in folder.read_log(self.log) if line["step"] <= self.step]
        self.last_metrics = next((line["val"] for line in lines if line["step"] == self.step and "val" in line), {})
        if self.writes:
            write_text(self.log, "".join(json.dumps(line) + "\n" for line in lines))

    def _calibrate(self, count: int, notes: list[str]) -> None:
        """Queries in closed form from training photos of all classes; every process comes to the same ones."""
        samples, generator = Samples(self.data.train, self.config.seed), torch.Generator().manual_seed(self.config.seed)
        order = torch.randperm(len(samples), generator=generator)[:count].split(16)
        parts = each(order, "calibrating", show=self.show)
        photos = ([samples[-1, index].image for index in part.tolist()] for part in parts)
        # A detector takes photos as they are, and normalises them itself.
        pixels = self.task.pixels if self.config.task == "detection" else torch.stack
        calibrate(self.task.backbone, map(pixels, photos))
        notes.append(f"queries calibrated on {count} training photos (calibrate=0: random ones)")

    def _share(self, task: nn.Module) -> nn.Module:
        if self.place.world == 1:
            return task
        if self.config.parallel == "ddp":
            ids = [self.place.device.index] if self.place.device.type == "cuda" else None
            return DistributedDataParallel(task, device_ids=ids)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(self.place.device.type, (self.place.world,))
        getattr(mesh, "_pg_registry", {}).clear()  # for torch.compile alone; DTensor's caches keep the mesh for ever
        for block in task.backbone.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        shared: Any = fully_shard(task, mesh=mesh)
        for method in ("predictions", "slide"):  # evaluation calls them, and needs whole parameters in them
            if hasattr(task, method):
                register_fsdp_forward_method(shared, method)
        return shared

    def _restore(self, state: dict[str, Any]) -> None:
        path = self.out / "last.pt"
        try:
            checkpoint.restore(self.task, self.optimizer, state)
            self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
        except Exception as error:  # torch raises whatever it meets
            raise ValueError(f"checkpoint: {path} does not fit this model: {error}") from error
        self.step, self.best, self.totals = state["step"], state["best"], state["totals"]
        self.bad_in_a_row = state["bad_in_a_row"]

    def _save(self) -> None:
        state = checkpoint.state_of(self.task, self.optimizer)
        state |= {"scaler": self.scaler.state_dict(), "ema": None if self.ema is None else self.ema.state_dict()}
        state |= {"step": self.step, "best": self.best, "totals": self.totals, "bad_in_a_row": self.bad_in_a_row}
        self._write("last.pt", state)

    def _write(self, name: str, state: dict[str, Any]) -> None:
        state |= {"config": self.config.to_json(), "classes": self.data.classes}
        if self.writes:
            checkpoint.save(self.out / name, state | {"samples": [len(self.data.train), len(self.data.val)]})

    def _log(self, line: dict[str, Any]) -> None:
        where = {"step": self.step, "epoch": round(self.step / self.steps_an_epoch, 4)}
        if self.writes:
            with open(self.log, "a") as file:
                file.write(json.dumps(where | line) + "\n")

    def go(self) -> dict[str, Any]:
        """Train to the end. A run that had ended before gives its last evaluation."""
        config, place = self.config, self.place
        total, count = config.epochs * self.steps_an_epoch, len(self.data.train)
        if self.step >= total and not self.last_metrics:  # its line was lost
            self._evaluate()
        with Progress("training", total, done=self.step, show=self.show) as shown:
            while self.step < total:
                epoch, first = divmod(self.step, self.steps_an_epoch)
                shared = Batches(count, config, epoch, rank=place.rank, world=place.world, first_step=first)
                loader = iter(make_loader(self.data.train, shared, config))
                for _ in range(first, self.steps_an_epoch):
                    require_launcher(self.parent, "train")
                    start = time.perf_counter()
                    losses = self._step(loader)
                    self.step += 1
                    if self.step % config.log_steps == 0 or self.step == 1:
                        speed = config.batch_size / (time.perf_counter() - start)
                        shown.update(0, f"loss {losses['loss']:.3f}")
                        self._log(losses | self.totals | {"images/s": round(speed, 2)})
                    shown.update()
                    at_end = self.step % self.steps_an_epoch == 0
                    if at_end and ((epoch + 1) % config.eval_epochs == 0 or self.step == total):
                        self._evaluate()
                    if self.step % config.save_steps == 0 or at_end:
                        self._save()
        return self.last_metrics

    def _step(self, loader: Iterator[Any]) -> dict[str, Any]:
        """One update from batch_size images; none where the loss or its gradient is not finite."""
        config, device = self.config, self.place.device
        epoch = self.step / self.steps_an_epoch
        share = lr_share(config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * group["lr_scale"] * share
        if is_pruned(self.task.backbone):
            set_progress(self.task.backbone, progress(config, epoch))
        # loss, main, aux; samples that could not be read
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for part in range(config.accumulate):
            images, target, skipped = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), next(loader))
            with seeded(seed_of(config.seed, self.step, part, self.place.rank)), self._synchronised(part):
                if self.mix is not None:
                    images, target = self.mix(images, target)
                with autocast(config, device):
                    losses = self.wrapped(images, target)
                loss = sum(losses.values()) / config.accumulate
                self.scaler.scale(loss).backward()
            values = [loss * config.accumulate, losses["main"], losses["aux"]]
            sums += torch.stack([value.detach().double() for value in values] + [sums.new_tensor(skipped)])
        if self.place.world > 1:
            dist.all_reduce(sums)
        means = (sums[:3] / (config.accumulate * self.place.world)).tolist()
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
                    f"train: the loss or its gradient was not finite in {self.bad_in_a_row} steps in a row, the last "
                    f"{self.step} (main {means[1]}, auxiliary {means[2]}, learning rate {config.lr * share:.3g}). Try "
                    "a lower lr, clip_grad, or amp='bfloat16'"
                )
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": means[0], "main": means[1], "aux": means[2], "lr": config.lr * share}

    def _clip(self) -> bool:
        """Clip the gradient's norm; whether it may be applied. Infinite ones in float16 are the scaler's to handle."""
        if self.scaler.is_enabled() and not self.config.clip_grad:
            return True
        self.scaler.unscale_(self.optimizer)
        norm: Any = nn.utils.clip_grad_norm_(self.task.parameters(), self.config.clip_grad or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return self.scaler.is_enabled() or bool(norm.isfinite())

    def _synchronised(self, part: int) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged with the last part of a step only."""
        last = part == self.config.accumulate - 1
        if isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext() if last else self.wrapped.no_sync()
        if self.place.world > 1:
            self.wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def _evaluate(self) -> None:
        """Measure the weights, and their average where there is one; the better one counts."""
        config, main, place = self.config, MAIN[self.config.task], self.place
        tasks: dict[str, Any] = {"weights": self.task} | ({} if self.ema is None else {"average": self.ema.module})
        reached: dict[str, dict[str, Any]] = {}
        for name, task in tasks.items():
            if is_pruned(task.backbone):
                set_progress(task.backbone, progress(config, self.step / self.steps_an_epoch))
            loader = val_loader(self.data.val, config, rank=place.rank, world=place.world)
            reached[name] = evaluate(task, loader, config, len(self.data.classes), place.device, self.show)
        best = max(reached, key=lambda name: reached[name][main])
        self.last_metrics = reached[best].copy()
        if self.ema is not None:
            self.last_metrics |= {"of": best, **{name: metrics[main] for name, metrics in reached.items()}}
        self._log({"val": self.last_metrics})
        if self.last_metrics[main] > self.best:
            self.best = self.last_metrics[main]
            whole = checkpoint.state_of(self.task, self.optimizer) if best == "weights" else {}
            weights = whole["model"] if whole else self.ema.module.state_dict()
            self._write("best.pt", {"model": weights, "step": self.step, "metrics": self.last_metrics})


def rebuild(out: str | Path) -> tuple[Any, Config, list[str]]:
    """The task of a run in eval mode, its configuration and its classes: from best.pt, else last.pt.

    Raises FileNotFoundError where there is no checkpoint, ValueError where it does not fit its configuration.
    """
    best, last = Path(out) / "best.pt", Path(out) / "last.pt"
    path = best if best.exists() else last
    state = checkpoint.load(path, "config", "classes")
    config = dataclasses.replace(Config.parse(state["config"], path), pretrained=False)
    task = build.task(config.changed(weights=""), len(state["classes"]))
    checkpoint.load_model(task, state["model"], path)
    return task.eval(), config, state["classes"]
