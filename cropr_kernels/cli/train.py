"""`cropr train` and `cropr eval`."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..inference.loading import is_run_folder, load_with_queries
from ..models.adapters import find_spec
from ..pruning.api import set_rate
from ..pruning.maps import pruning_map
from ..pruning.model import CroprModules, is_pruned
from ..tasks import Classifier, Detector, Task
from ..train.config import PRESETS, Config
from ..train.data import Data, load_data, val_loader
from ..train.evaluate import MAIN, evaluate
from ..train.folder import read_log, require_same
from ..train.loop import processes, rebuild, train
from ..utils.io import table, write_text
from ..utils.optional import import_optional
from ..utils.viz import save_curves, save_pruning_maps
from .outputs import check_file, check_folder, checked_rates


def configure(options: argparse.Namespace) -> Config:
    """Return the configuration of the arguments of `cropr train`."""
    config = PRESETS.get(options.preset, Config())
    saved = options.out / "config.json"
    if options.config or (not options.preset and saved.exists()):
        config = Config.read(options.config or saved)
    malformed = [option for option in options.options if "=" not in option]
    if malformed:
        raise ValueError(f"options must be name=value, got {malformed[0]!r}")
    values: dict[str, Any] = dict(option.partition("=")[::2] for option in options.options)
    if options.data:
        values["data"] = options.data
    if config.schedule.keys() & values.keys():  # a schedule replaces that of the preset
        values = dict.fromkeys(config.schedule) | values
    config = config.changed(**values)
    if not config.data:
        raise ValueError("name the folder of the dataset: --data FOLDER")
    return config


def need_libraries(config: Config) -> None:
    """Raise ImportError for missing libraries, before a run needs them."""
    for library in (
        "timm",
        "torchvision",
        "torchmetrics",
        *["faster_coco_eval"] * (config.task == "detection"),
    ):
        import_optional(library, "train", "cropr train")


def run_train(options: argparse.Namespace) -> None:
    config = configure(options)
    check_folder(options.out)
    need_libraries(config)
    metrics = train(config, options.out, show=not options.quiet)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(metrics))


def _load_run(folder: Path, options: argparse.Namespace) -> tuple[Task, Config, Data]:
    """Load the task of a run of `cropr train`, its configuration and its data."""
    task, config, classes = rebuild(folder)
    config = config.changed(data=options.data) if options.data else config
    need_libraries(config)
    data = load_data(config)
    require_same(folder, data, classes)
    return task, config, data


def _load_classifier(options: argparse.Namespace) -> tuple[Task, Config, Data]:
    """Load any other classifier, and photos val/CLASS/*.jpg with its preprocessing."""
    if not options.data:
        raise ValueError(
            f"{options.model} is not a run of cropr train: name a folder with photos "
            "val/CLASS/*.jpg, --data FOLDER"
        )
    options.rate = 0 if options.rates == [0] else None
    model, pixels, *_ = load_with_queries(options)
    config = Config(data=options.data).changed(
        img_size=pixels.img_size, mean=pixels.mean, std=pixels.std
    )
    need_libraries(config)
    folder = Path(options.data) / config.val_split[0]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--data must be a folder with photos in {config.val_split[0]}/CLASS, there is no "
            f"{folder}"
        )
    image_folder = import_optional("torchvision.datasets", "train", "cropr eval").ImageFolder
    val = image_folder(folder, transform=pixels.normalize, loader=pixels.load)
    if len(val.classes) != find_spec(model).num_classes:
        expected = (
            f"{find_spec(model).num_classes} folders, one for each class of the model and in "
            "their order"
        )
        raise ValueError(f"{folder} must hold {expected}, got {len(val.classes)}")
    return Classifier(model).eval(), config, Data(val, val, val.classes)


def run_eval(options: argparse.Namespace) -> None:
    is_run = is_run_folder(options.model)
    out = options.out or Path(options.model if is_run else "eval")
    check_file(out / "eval.json", ".json", "the folder")
    task, config, data = (
        _load_run(Path(options.model), options) if is_run else _load_classifier(options)
    )
    pruned = is_pruned(task.backbone)
    rows = []
    if options.rates and not pruned:
        raise ValueError("--rates needs a pruned model; this run has no schedule")
    rates = checked_rates(task.backbone, options.rates) if options.rates else [None]
    with processes(config) as process:
        task = task.to(process.device)
        for rate in rates:
            if rate is not None:
                set_rate(task.backbone, rate)
            loader = val_loader(data.val, config, rank=process.rank, world=process.world)
            schedule = "no pruning"
            if pruned:
                modules: CroprModules = task.backbone.cropr  # type: ignore[assignment]
                schedule = str(modules.config.schedule)
            show = not options.quiet and process.rank == 0
            metrics = evaluate(task, loader, config, len(data.classes), process.device, show)
            rows.append({"schedule": schedule, **metrics})
        if process.rank:
            return
    names = [name for name in rows[0] if name not in ("aux", "schedule")]
    cells = [[row["schedule"], *(f"{row[name]:g}" for name in names)] for row in rows]
    print(table(["schedule", *names], cells), flush=True)
    write_text(out / "eval.json", json.dumps(rows, indent=1) + "\n")
    try:
        draw(task.cpu(), config, data, out, options.pictures)
    except ImportError as error:
        print(f"no picture: {error}")


@torch.no_grad()
def draw(task: Task, config: Config, data: Data, out: Path, pictures: int) -> None:
    """Write curves.png, the training curves, and maps.png, pruning maps."""
    lines = read_log(out / "metrics.jsonl")
    if lines:
        save_curves(out / "curves.png", lines, MAIN[config.task])
        print(f"wrote {out / 'curves.png'}")
    if not pictures or not is_pruned(task.backbone):
        return
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    step = max(len(data.val) // pictures, 1)
    images = []
    maps = []
    for index in range(0, len(data.val), step)[:pictures]:
        image = data.val[index][0]
        if isinstance(task, Detector):
            pixels = task.pixels([image])[0]
        else:  # crop or pad to the training size
            height, width = image.shape[1:]
            pixels = F.pad(image, (0, config.img_size[1] - width, 0, config.img_size[0] - height))
        maps.append(pruning_map(task.backbone, pixels[None])[0])
        images.append(pixels * std + mean)
    depth = len(find_spec(task.backbone).blocks)
    save_pruning_maps(out / "maps.png", torch.stack(images), torch.stack(maps), depth)
    print(f"wrote {out / 'maps.png'}")
