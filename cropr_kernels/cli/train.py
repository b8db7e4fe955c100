"""`cropr train` and `cropr eval`."""

import argparse
import json
import os
from typing import Any

import torch
import torch.nn.functional as F

from ..models.adapters import find_spec
from ..pruning.api import set_rate
from ..pruning.maps import pruning_map
from ..pruning.model import is_pruned
from ..train.config import PRESETS, Config
from ..train.data import Data, load_data, val_loader
from ..train.evaluate import MAIN, evaluate
from ..train.folder import read_log, require_same
from ..train.loop import processes, rebuild, train
from ..utils.io import table, write_text
from ..utils.optional import need
from ..utils.viz import save_curves, save_pruning_maps
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


def run_eval(options: argparse.Namespace) -> None:
    task, config, classes = rebuild(options.out)
    config = config.changed(data=options.data) if options.data else config
    need_libraries(config)
    check_file(options.out / "eval.json", ".json", "the folder")
    data = load_data(config)
    require_same(options.out, data, classes)
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
    write_text(options.out / "eval.json", json.dumps(rows, indent=1) + "\n")
    try:
        draw(task.cpu(), config, data, options)
    except ImportError as error:
        print(f"no picture: {error}")


@torch.no_grad()
def draw(task: Any, config: Config, data: Data, options: argparse.Namespace) -> None:
    """Write curves.png, how training went, and maps.png, where the model prunes."""
    lines = read_log(options.out / "metrics.jsonl")
    if lines:
        save_curves(options.out / "curves.png", lines, MAIN[config.task])
        print(f"wrote {options.out / 'curves.png'}")
    if not options.pictures or not is_pruned(task.backbone):
        return
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    step = max(len(data.val) // options.pictures, 1)
    shown, maps = [], []
    for index in range(0, len(data.val), step)[: options.pictures]:
        image = data.val[index][0]
        if config.task == "detection":
            pixels = task.pixels([image])[0]
        else:  # cut or padded to the size of training
            height, width = image.shape[1:]
            pixels = F.pad(image, (0, config.img_size[1] - width, 0, config.img_size[0] - height))
        maps.append(pruning_map(task.backbone, pixels[None])[0])
        shown.append(pixels * std + mean)
    depth = len(find_spec(task.backbone).blocks)
    save_pruning_maps(options.out / "maps.png", torch.stack(shown), torch.stack(maps), depth)
    print(f"wrote {options.out / 'maps.png'}")
