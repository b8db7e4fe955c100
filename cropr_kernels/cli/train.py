"""`cropr train` and `cropr eval`."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..models.adapters import find_spec
from ..pruning.api import set_rate
from ..pruning.maps import pruning_map
from ..pruning.model import is_pruned
from ..tasks import Classifier
from ..train.config import PRESETS, Config
from ..train.data import Data, load_data, val_loader
from ..train.evaluate import MAIN, evaluate
from ..train.folder import read_log, require_same
from ..train.loop import processes, rebuild, train
from ..utils.io import table, write_text
from ..utils.optional import need
from ..utils.viz import save_curves, save_pruning_maps
from .common import is_run_folder, load_with_queries
from .outputs import check_file, check_folder, checked_rates


def configure(options: argparse.Namespace) -> Config:
    """The configuration that the arguments of `cropr train` describe."""
    config, own = PRESETS.get(options.preset, Config()), options.out / "config.json"
    if options.config or (not options.preset and own.exists()):
        config = Config.read(options.config or own)
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
        raise ValueError("say where the dataset is: --data FOLDER")
    return config


def need_libraries(config: Config) -> None:
    """Raise ImportError where a library is missing that a run would miss only once it is under way."""
    for library in ("timm", "torchvision", "torchmetrics", *["faster_coco_eval"] * (config.task == "detection")):
        need(library, "train", "cropr train")


def run_train(options: argparse.Namespace) -> None:
    config = configure(options)
    check_folder(options.out)
    need_libraries(config)
    metrics = train(config, options.out, show=not options.quiet)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(metrics))


def _of_run(folder: Path, options: argparse.Namespace) -> tuple[Any, Config, Data]:
    """The task of a run of `cropr train`, its configuration and its data."""
    task, config, classes = rebuild(folder)
    config = config.changed(data=options.data) if options.data else config
    need_libraries(config)
    data = load_data(config)
    require_same(folder, data, classes)
    return task, config, data


def _of_model(options: argparse.Namespace) -> tuple[Any, Config, Data]:
    """A classifier that any other name means, and photos val/CLASS/*.jpg, read as the model takes them."""
    if not options.data:
        raise ValueError(
            f"{options.model} is no run of cropr train: say where photos val/CLASS/*.jpg are, --data FOLDER"
        )
    options.rate = 0 if options.rates == [0] else None
    model, pixels, _ = load_with_queries(options)
    config = Config(data=options.data).changed(img_size=pixels.img_size, mean=pixels.mean, std=pixels.std)
    need_libraries(config)
    folder = Path(options.data) / config.val_split[0]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--data must be a folder with photos in {config.val_split[0]}/CLASS, there is no {folder}"
        )
    make = need("torchvision.datasets", "train", "cropr eval").ImageFolder
    val = make(folder, transform=pixels.normalize, loader=pixels.load)
    if len(val.classes) != find_spec(model).num_classes:
        wanted = f"{find_spec(model).num_classes} folders, one for each class of the model and in their order"
        raise ValueError(f"{folder} must hold {wanted}, it holds {len(val.classes)}")
    return Classifier(model).eval(), config, Data(val, val, val.classes)


def run_eval(options: argparse.Namespace) -> None:
    is_run = is_run_folder(options.model)
    out = options.out or Path(options.model if is_run else "eval")
    check_file(out / "eval.json", ".json", "the folder")
    task, config, data = _of_run(Path(options.model), options) if is_run else _of_model(options)
    classes = data.classes
    pruned, rows = is_pruned(task.backbone), []
    if options.rates and not pruned:
        raise ValueError("--rates needs a pruned model; this run has no schedule")
    rates = checked_rates(task.backbone, options.rates) if options.rates else [None]
    with processes(config) as place:
        task = task.to(place.device)
        for rate in rates:
            if rate is not None:
                set_rate(task.backbone, rate)
            loader = val_loader(data.val, config, rank=place.rank, world=place.world)
            schedule = str(task.backbone.cropr.config.schedule) if pruned else "no pruning"
            metrics = evaluate(task, loader, config, len(classes), place.device, not options.quiet and place.rank == 0)
            rows.append({"schedule": schedule, **metrics})
        if place.rank:
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
def draw(task: Any, config: Config, data: Data, out: Path, pictures: int) -> None:
    """Write curves.png, how training went, and maps.png, where the model prunes."""
    lines = read_log(out / "metrics.jsonl")
    if lines:
        save_curves(out / "curves.png", lines, MAIN[config.task])
        print(f"wrote {out / 'curves.png'}")
    if not pictures or not is_pruned(task.backbone):
        return
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    step = max(len(data.val) // pictures, 1)
    shown, maps = [], []
    for index in range(0, len(data.val), step)[:pictures]:
        image = data.val[index][0]
        if config.task == "detection":
            pixels = task.pixels([image])[0]
        else:  # cut or padded to the size of training
            height, width = image.shape[1:]
            pixels = F.pad(image, (0, config.img_size[1] - width, 0, config.img_size[0] - height))
        maps.append(pruning_map(task.backbone, pixels[None])[0])
        shown.append(pixels * std + mean)
    depth = len(find_spec(task.backbone).blocks)
    save_pruning_maps(out / "maps.png", torch.stack(shown), torch.stack(maps), depth)
    print(f"wrote {out / 'maps.png'}")
