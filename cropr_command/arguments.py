"""The commands and their arguments; cropr_kernels.cli, loaded on demand, runs them."""

import argparse
from pathlib import Path
from typing import Any, TypeAlias

from .parsing import Parser

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("torch", "aoti", "onnx", "openvino")
_PRESETS = Path(__file__).parents[1] / "cropr_kernels" / "train" / "presets"
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def count(text: str) -> int:
    """Parse a positive integer, as `type` of an argument."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return int(text)


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "model": dict(
        help="a preset of cropr_kernels, a timm or torchvision model, a weight file, or a folder "
        "of Hugging Face, "
        "cropr.save or cropr train"
    ),
    "--arch": dict(
        help="of a weight file: a preset, or a timm or torchvision model (default: by its tensors)"
    ),
    "--img-size": dict(type=count, help="side of the images in pixels (default: the model's)"),
    "--num-classes": dict(type=int, help="0: features in place of classes (default: the model's)"),
    "--queries": dict(
        type=Path,
        help="file of cropr calibrate; it also sets rate, merge and llf, unless options do",
    ),
    "--rate": dict(
        type=int,
        help="tokens pruned after each block (default: that of the queries or the model, or 8)",
    ),
    "--keep": dict(type=Path, help="schedule of cropr tune"),
    "--rates": dict(
        type=int, nargs="+", help="tokens pruned after each block (default: four rates)"
    ),
    "--llf": dict(
        action=argparse.BooleanOptionalAction,
        help="Last Layer Fusion: all tokens in the last block, pruned ones with the change of "
        "their parent",
    ),
    "--merge": dict(
        action=argparse.BooleanOptionalAction,
        help="merge pruned tokens into kept ones, or drop them (default: that of the queries or "
        "the model, or merge)",
    ),
    "--mean": dict(type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)"),
    "--std": dict(type=float, nargs=3, help="of the pixels (default: the model's, or 0.5)"),
    "--crop-pct": dict(
        type=float, help="side of the crop over that of the resized photo (default: the model's)"
    ),
    "--interpolation": dict(
        choices=("bicubic", "bilinear", "lanczos"), help="default: the model's"
    ),
    "--max-pixels": dict(
        type=count, help="of a photo; larger ones are not read (default: 178956970)"
    ),
    "--batch": dict(type=count, default=1, help="images at a time (default: %(default)s)"),
    "--rounds": dict(
        type=count, help="timings of each, for the median (default: 3 to 9, as many as take 45 s)"
    ),
    "--device": dict(help="default: cuda if there is a GPU, else cpu"),
    "--dtype": dict(choices=DTYPES, help="default: bfloat16 on cuda, else float32"),
    "--quiet": dict(action="store_true", help="no progress"),
}


def add_arguments(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add arguments that several commands share."""
    for name in names:
        parser.add_argument(name, **_ARGUMENTS[name])


def add_model(parser: Parser, **options: object) -> None:
    """Add the arguments that name a model."""
    parser.add_argument("model", **_ARGUMENTS["model"] | options)
    add_arguments(parser, "--arch", "--img-size", "--num-classes")


def add_pixels(parser: Parser) -> None:
    """Add the arguments of reading photos."""
    add_arguments(parser, "--mean", "--std", "--crop-pct", "--interpolation", "--max-pixels")


def add_pruning(parser: Parser) -> None:
    """Add the arguments of `load_with_queries`."""
    add_model(parser)
    add_arguments(parser, "--queries", "--llf", "--merge")
    add_pixels(parser)
    schedule = parser.add_mutually_exclusive_group()
    add_arguments(schedule, "--rate", "--keep")


def _add_info(commands: Commands) -> None:
    parser = commands.add_parser(
        "info", help="versions, build facts and kernels; or the pruning of a model"
    )
    add_arguments(parser, "--rate", "--llf", "--merge")
    add_model(parser, nargs="?", help="as for the other commands; a name has random weights")
    parser.set_defaults(run="info.run", after_stop="nothing was written")


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check every op, and small networks, on each device of this machine",
        description="Compare every op, in each dtype, with its definition, and small pruned "
        "networks "
        "with "
        "the "
        "functional ops, on the CPU and on each GPU; the first run compiles its kernels. Failures "
        "are printed, and the "
        "exit code is then 1.",
    )
    parser.add_argument("--device", help="check only this device (default: the CPU and every GPU)")
    add_arguments(parser, "--quiet")
    parser.set_defaults(
        run="doctor.run", dtype=None, after_stop="failures so far are printed above"
    )


def _add_calibrate(commands: Commands) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="prune a pretrained model without labels and without training",
        description="Solve for the queries of a pretrained model on photos of a folder, compare "
        "the "
        "pruned model with "
        "the unpruned one on others, at several rates, and recommend one. Load them with "
        "cropr.load_queries.",
    )
    add_model(parser)
    add_arguments(parser, "--rates", "--llf", "--merge", "--quiet")
    add_pixels(parser)
    parser.add_argument(
        "folder", type=Path, help="photos, searched in all folders below; a few hundred are enough"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("queries.safetensors"), help="file (default: %(default)s)"
    )
    parser.add_argument(
        "--photos", type=count, default=400, help="photos to calibrate on, at most (default: 400)"
    )
    parser.add_argument(
        "--held-out", type=count, default=200, help="photos to compare on, at most (default: 200)"
    )
    parser.add_argument(
        "--least",
        type=float,
        default=95.0,
        help="lowest agreement of a recommended rate, %% (default: 95)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random choice of photos (default: 0)"
    )
    parser.set_defaults(
        run="calibrate.run",
        after_stop="{out} is written once the queries are known; the same command starts over",
    )


def _add_map(commands: Commands) -> None:
    parser = commands.add_parser(
        "map",
        help="draw the patches that a model prunes from photos, block by block",
        description="Write maps.png (photos, each with the block after which each patch is "
        "pruned), "
        "merged.png "
        "(the merged tokens, if merging), and for each photo NAME.gif, an animation, and "
        "NAME_blocks.png, "
        "its frames side by side. Without --queries the model is calibrated on these photos.",
    )
    add_model(parser)
    add_arguments(parser, "--queries", "--rate", "--llf", "--merge", "--quiet")
    add_pixels(parser)
    parser.add_argument("images", type=Path, nargs="+", help="photos, or folders of them")
    parser.add_argument(
        "--limit", type=count, default=16, help="photos to draw, at most (default: 16)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("maps"), help="folder to write to (default: maps)"
    )
    parser.set_defaults(
        run="map.run",
        after_stop="the pictures named above are complete; the same command starts over",
    )


def _add_view(commands: Commands) -> None:
    parser = commands.add_parser(
        "view",
        help="open a local page on which photos show what pruning does",
        description="Serve a page: drop a photo, move the rate, and see the tokens it ends in, "
        "the classes before and after, FLOPs and time. Nothing is kept, and nothing leaves this "
        "machine. Without --queries the model is calibrated on the examples.",
    )
    add_pruning(parser)
    add_arguments(parser, "--device", "--dtype")
    parser.add_argument(
        "photos",
        type=Path,
        nargs="*",
        help="examples: photos, or folders of them (default: examples/photos of a checkout)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: other machines too (default: 127.0.0.1)",
    )
    parser.add_argument("--port", type=count, help="default: the first free one from 7860 on")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.set_defaults(run="view.run", after_stop="the page is closed, nothing was kept")


def _add_tune(commands: Commands) -> None:
    parser = commands.add_parser(
        "tune",
        help="find the schedule that reaches a speed on this device",
        description="Measure how the time of a model depends on the number of tokens on this "
        "device, "
        "choose how many "
        "are kept after each block, measure that, and write it for cropr.apply(model, keep=FILE). "
        "A name has random "
        "weights.",
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--speedup", type=float, help="times as fast as the unpruned model")
    goal.add_argument("--latency-ms", type=float, help="milliseconds of a forward of the batch")
    add_model(parser)
    add_arguments(
        parser, "--batch", "--llf", "--merge", "--device", "--dtype", "--rounds", "--quiet"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("schedule.json"), help="file (default: %(default)s)"
    )
    parser.set_defaults(
        run="tune.run", after_stop="nothing was written; the same command starts over"
    )


def _add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure a model on this device, unpruned and at several rates",
        description="Time a deployed model at several rates and batch sizes, in turns; a name has "
        "random "
        "weights. The "
        "engine is first compared with the functional ops. Writes OUT.json and, with matplotlib, "
        "OUT.png.",
    )
    add_model(parser)
    add_arguments(
        parser, "--rates", "--llf", "--merge", "--device", "--dtype", "--rounds", "--quiet"
    )
    parser.add_argument(
        "--batch", type=count, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)"
    )
    parser.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="replay CUDA graphs (default: of small batches)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench"), help="file without suffix (default: bench)"
    )
    parser.set_defaults(run="bench.run", after_stop="the tables above are in {out}.json")


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a pruned model as ONNX, a torch.export program or an AOTInductor package",
        description="Write a pruned model in each format, compare what it computes with the model, "
        "and "
        "time it.",
    )
    add_pruning(parser)
    add_arguments(parser, "--batch", "--device", "--rounds", "--quiet")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=["onnx"], help="default: onnx"
    )
    parser.add_argument(
        "--ops",
        choices=["cropr", "aten"],
        help="aten: the file needs no cropr ops (default: as fits)",
    )
    parser.add_argument(
        "--images", type=Path, nargs="+", help="photos to compare on (default: random numbers)"
    )
    parser.add_argument(
        "--dynamic-batch", action="store_true", help="the file takes batches of any size"
    )
    parser.add_argument(
        "--map", action="store_true", help="also output the block after which each patch is pruned"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("exported"), help="folder to write to (default: exported)"
    )
    parser.set_defaults(run="export.run", after_stop="the files named above are complete")


def _add_infer(commands: Commands) -> None:
    parser = commands.add_parser(
        "infer",
        help="classify or embed photos, of folders, WebDataset shards or Parquet, into Parquet",
        description="Run a pruned model over photos. Writes part-00000.parquet and so on; the same "
        "command resumes where it was stopped. Under torchrun all processes share the work; with "
        "--engine ray a cluster does. Folders, shards and results may be URLs of fsspec "
        "(s3://bucket/photos).",
    )
    add_pruning(parser)
    add_arguments(parser, "--device", "--dtype", "--quiet")
    parser.add_argument(
        "source",
        nargs="+",
        help="folders of photos or of WebDataset shards (.tar); shards; .parquet files with a "
        "column of bytes; URLs may contain *",
    )
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--features", action="store_true", help="features in place of classes")
    parser.add_argument("--top", type=count, default=5, help="classes of each photo (default: 5)")
    parser.add_argument("--batch", type=count, default=32, help="images at a time (default: 32)")
    parser.add_argument(
        "--unit", type=count, default=2048, help="photos of a folder in one file (default: 2048)"
    )
    parser.add_argument(
        "--workers", type=count, default=4, help="threads that read photos (default: 4)"
    )
    parser.add_argument(
        "--engine", choices=("plain", "ray"), default="plain", help="default: %(default)s"
    )
    parser.add_argument(
        "--actors",
        type=count,
        help="of --engine ray, at most (default: one for each GPU, or CPU, of the cluster)",
    )
    parser.set_defaults(
        run="infer.run", after_stop="the same command resumes with the missing files"
    )


def _add_train(commands: Commands) -> None:
    training = commands.add_parser(
        "train",
        help="train a pruned Vision Transformer",
        description="Train, or resume the run in OUT. Options are those of config.json, as "
        "name=value: "
        "rate=8 llf=true "
        "img_size=224,224. Under torchrun all processes share the work.",
    )
    source = training.add_mutually_exclusive_group()
    source.add_argument(
        "--preset",
        choices=sorted(file.stem for file in _PRESETS.glob("*.json")),
        help="a published recipe to start from",
    )
    source.add_argument("--config", type=Path, help="a config.json to start from")
    training.add_argument("--data", help="root folder of the dataset")
    training.add_argument("--out", type=Path, required=True, help="folder of the run")
    add_arguments(training, "--quiet")
    training.add_argument(
        "options", nargs="*", metavar="name=value", help="any option of the configuration"
    )
    training.hint = "options of the configuration must be name=value"
    training.set_defaults(
        run="train.run_train",
        after_stop="the same command resumes from the last checkpoint in {out}",
    )
    measuring = commands.add_parser(
        "eval",
        help="measure a model on data with labels, and draw what it prunes",
        description="Measure the model of a run of cropr train on its validation data, or any "
        "classifier "
        "on the photos "
        "in DATA/val/CLASS, one folder a class in the order of its classes. Writes eval.json, "
        "maps.png, curves.png.",
    )
    add_model(measuring)
    add_arguments(measuring, "--queries", "--llf", "--merge")
    add_pixels(measuring)
    measuring.add_argument("--data", help="root folder of the dataset (default: that of the run)")
    measuring.add_argument(
        "--out", type=Path, help="folder to write to (default: that of the run, or eval)"
    )
    measuring.add_argument(
        "--rates", type=int, nargs="+", help="rates to measure (default: the model's schedule)"
    )
    measuring.add_argument(
        "--pictures", type=int, default=6, help="photos in maps.png; 0 for none (default: 6)"
    )
    add_arguments(measuring, "--quiet")
    measuring.set_defaults(
        run="train.run_eval", after_stop="nothing was written; the same command starts over"
    )


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from cropr_kernels.cli.info import versions

        print(", ".join(f"{name} {value}" for name, value in versions().items()))
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of all commands.

    `run` names a function in cropr_kernels.cli; `after_stop` describes the state after an
    interruption."""
    parser = argparse.ArgumentParser(prog="cropr", description="Token Cropr for PyTorch.")
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show versions and device, and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for add in (
        _add_info,
        _add_doctor,
        _add_calibrate,
        _add_map,
        _add_view,
        _add_tune,
        _add_bench,
        _add_export,
        _add_infer,
        _add_train,
    ):
        add(commands)
    return parser
