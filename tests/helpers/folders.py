"""Small models with random weights, saved as files and folders that commands take."""

import importlib

import pytest
import torch

import cropr_kernels as cropr
from helpers.models import HF, SMALL, TEXT, randomize, timm_vit, transformers

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def weight_file(folder):
    path = folder / "tiny.pt"
    torch.save(cropr.create_vit("vit_tiny_patch16_224", num_classes=5).state_dict(), path)
    return str(path)


def timm_folder(folder):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    model = randomize(timm_vit())
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "mean": MEAN, "std": STD}
    model.pretrained_cfg = {**config, "input_size": (3, 64, 64)}
    hub = importlib.import_module("timm.models")
    hub.save_for_hf(model, folder / "timm", model_config=model.pretrained_cfg, model_args=SMALL)
    return f"local-dir:{folder / 'timm'}"


def transformers_classifier(folder):
    t = transformers()
    path = folder / "vit"
    randomize(t.ViTForImageClassification(t.ViTConfig(**HF, num_labels=5))).half().save_pretrained(
        path
    )
    t.ViTImageProcessor(image_mean=list(MEAN), image_std=list(STD)).save_pretrained(path)
    return str(path)


def transformers_pruned(folder):
    t = transformers()
    path = folder / "pruned"
    model = randomize(t.ViTForImageClassification(t.ViTConfig(**HF, num_labels=5)))
    cropr.apply(model, rate=3, merge=True, num_outputs=0).save_pretrained(path)
    return str(path)


def transformers_features(folder):
    t = transformers()
    path = folder / "dinov2"
    randomize(t.Dinov2Model(t.Dinov2Config(**HF))).save_pretrained(path)
    return str(path)


def transformers_two_towers(folder):
    t = transformers()
    path = folder / "siglip"
    randomize(t.SiglipModel(t.SiglipConfig(vision_config=HF, text_config=TEXT))).save_pretrained(
        path
    )
    return str(path)


FOLDERS = {
    "weight file": weight_file,
    "timm": timm_folder,
    "transformers classifier": transformers_classifier,
    "transformers, saved pruned": transformers_pruned,
    "transformers features": transformers_features,
    "transformers image tower": transformers_two_towers,
}
