"""The main job: train, deploy and time pruned Vision Transformers on whatever device is there.

python -m examples.demo                      digits and the speed table
python -m examples.demo --weights FILE       also classes and pruning maps of the photos, from a local weight file
python -m examples.demo --pretrained         the same with timm's weights, which are downloaded
"""

import argparse
from pathlib import Path

import torch

import cropr_kernels as cropr
from cropr_kernels.models.factory import create_model, load_weights
from cropr_kernels.utils.viz import save_merge_maps, save_pruning_maps
from examples import digits, photos


def run_digits(out: Path, epochs: int) -> None:
    plain = digits.train(seed=0, rate=0, epochs=epochs)
    pruned = digits.train(seed=0, rate=digits.RATE, epochs=epochs)
    _, _, images, _labels = digits.load()
    deployed = cropr.deploy(pruned.model)
    if not torch.equal(cropr.deploy(pruned.model, engine=False)(images), pruned.model(images)):
        raise RuntimeError("the deployed model's logits differ from the trained one's")
    print(f"Handwritten digits, {digits.TEST} test images, trained {epochs} epochs:")
    print(f"  no pruning  {plain.accuracy:.1f} %")
    print(f"  Cropr       {pruned.accuracy:.1f} %  with {100 * pruned.token_share:.0f} % of the tokens per block")
    shown = images[:8]
    maps = cropr.pruning_map(deployed, shown)
    titles = [f"says {guess}" for guess in deployed(shown).argmax(1).tolist()]
    path = out / "digits.png"
    save_pruning_maps(path, (shown + 1) / 2, maps, depth=len(deployed.blocks), titles=titles)
    print(f"  pruning maps: {path}\n")


def run_photos(out: Path, device: torch.device) -> None:
    names, images = photos.load_photos(device)
    rows = photos.compare(["vit_small_patch16_224", "vit_base_patch16_224"], images)
    print(f"{len(names)} photos at 224 px on {describe(device)}, float32, random weights, one batch:")
    print(photos.table(rows))
    path = out / "speed.png"
    photos.save_plot(path, rows, describe(device))
    print(f"plot: {path}\n")


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def class_names(count: int, metadata: dict[str, str]) -> list[str]:
    """Readable names where they are known: WordNet ids and ImageNet-1k through timm, else the class number."""
    classes = metadata.get("classes", "").split()
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return classes or [f"class {index}" for index in range(count)]
    if classes:
        info = ImageNetInfo("imagenet-22k")
        return [info.label_name_to_description(name, detailed=False) for name in classes]
    if count == 1000:
        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(index) for index in range(count)]
    return [f"class {index}" for index in range(count)]


@torch.inference_mode()
def run_pretrained(out: Path, device: torch.device, weights: str | None) -> None:
    names, images = photos.load_photos(device)
    if weights is not None:
        model, metadata = load_weights(weights)
    else:
        model, metadata = create_model("vit_tiny_patch16_224", pretrained=True), {}
    model = model.to(device)
    labels = class_names(model.num_classes, metadata)
    pixels = (images - 0.5) / 0.5
    before = model(pixels).argmax(1).tolist()
    cropr.calibrate(cropr.apply(model, rate=photos.RATE, merge=True, num_outputs=0), pixels)
    deployed = cropr.deploy(model)
    after = deployed(pixels).argmax(1).tolist()
    print(f"Classes of the photos, before and after merging with R = {photos.RATE}, calibrated on these photos:")
    width = max(len(name) for name in names)
    for name, first, second in zip(names, before, after):
        same = "same" if first == second else labels[second]
        print(f"  {name.ljust(width)}  {labels[first]}; merged: {same}")
    path = out / "photos.png"
    save_pruning_maps(path, images, cropr.pruning_map(deployed, pixels), depth=len(model.blocks), titles=names)
    print(f"pruning maps: {path}")
    path = out / "merged.png"
    save_merge_maps(path, images, cropr.merge_map(deployed, pixels), titles=names)
    print(f"which patches are one token in the end: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", metavar="FILE", help="local weights of a ViT: .safetensors or a state dict")
    source.add_argument("--pretrained", action="store_true", help="download timm's vit_tiny_patch16_224")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    parser.add_argument("--epochs", type=int, default=digits.EPOCHS, help="epochs on the digits (default: %(default)s)")
    options = parser.parse_args()
    if options.weights is not None and not Path(options.weights).is_file():
        parser.error(f"--weights: no file at {options.weights}")
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run_digits(options.out, options.epochs)
    run_photos(options.out, device)
    if options.weights is not None or options.pretrained:
        run_pretrained(options.out, device, options.weights)


if __name__ == "__main__":
    main()
