"""`cropr view`: a local page on which a photo shows what pruning does."""

import argparse
import threading
import webbrowser
from collections import Counter
from pathlib import Path

import torch

from ..inference.loading import device_and_dtype, is_run_folder, load_model
from ..models.adapters import find_spec
from ..models.class_names import class_names
from ..query_files import load_queries
from ..train.loop import rebuild
from ..utils.images import describe_skipped, find_named_photos
from ..utils.optional import import_optional, is_installed
from ..view.comparison import Viewer
from ..view.page import Content, serving

EXAMPLES = Path(__file__).parents[2] / "examples" / "photos"  # in a checkout
_LIMIT = 16  # examples


def run(options: argparse.Namespace) -> None:
    for library in ("PIL", "gradio"):
        if not is_installed(library):  # Gradio is imported once its folder is set
            import_optional(library, "view", "cropr view")
    device, dtype = device_and_dtype(options)
    skipped: Counter[str] = Counter()
    folders = options.photos or ([EXAMPLES] if EXAMPLES.is_dir() else [])
    photos = find_named_photos(folders, skipped) if folders else []
    loaded = load_model(options)
    model = loaded.model
    queries = None
    if options.queries is not None:
        load_queries(model, options.queries)
        queries = str(options.queries)
    elif loaded.trained:
        queries = f"those that {options.model} was saved with"
    elif not photos:
        raise ValueError(
            "without queries the page calibrates on photos, and there are none: name photos or "
            "folders of them, or pass --queries FILE"
        )
    names = (
        rebuild(options.model)[2]
        if is_run_folder(options.model)
        else class_names(model, options.model, find_spec(model).num_classes)
    )
    viewer = Viewer(model, loaded.pixels, names, device=device, dtype=dtype)
    content = Content(Path(options.model).name, photos[:_LIMIT], queries, _describe(device))
    print(f"photos: {loaded.pixels}{describe_skipped(skipped)}")
    with serving(viewer, content, listen=options.host, port=options.port) as address:
        print(f"{address} until Ctrl-C", flush=True)
        if options.open:
            webbrowser.open(address)
        threading.Event().wait()


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
