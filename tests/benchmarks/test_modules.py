"""Replacements of Cropr modules, and the photos that detection trains on."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from benchmarks.baselines.modules import AttentionTopK, PublishedMultiHead, replace_modules
from benchmarks.baselines.network import Reduced
from benchmarks.baselines.registry import SYSTEMS
from benchmarks.baselines.scorers import MultiHeadCropr


@pytest.mark.parametrize("llf", [False, True])
@torch.no_grad()
def test_attention_top_k_in_a_pruned_model_is_that_of_the_reduced_network(llf):
    model, images = randomize(reference_vit()).eval(), torch.randn(2, 3, 64, 64)
    counts = cropr.Schedule(rate=9).counts(65, len(model.blocks), 1, llf)
    expected = Reduced(model, SYSTEMS["attention top-k"], counts, llf=llf)(images)
    cropr.apply(model, rate=9, llf=llf)
    replace_modules(model, AttentionTopK)
    torch.testing.assert_close(model(images), expected)


def test_published_and_folded_heads_keep_the_same_tokens():
    module = randomize(MultiHeadCropr(16, 3, num_heads=4))
    x = torch.randn(2, 20, 16)
    published, folded = PublishedMultiHead(module)(x, 12, 1), module.eval()(x, 12, 1)
    assert torch.equal(published.kept_idx, folded.kept_idx) and torch.equal(
        published.kept, folded.kept
    )


@pytest.mark.parametrize("split", [True, False], ids=["split", "all for both"])
def test_photos_are_drawn_by_the_seed_and_objects_may_lose_their_category(split, tmp_path):
    pytest.importorskip("timm", reason="needs the train extra")
    detection = pytest.importorskip("benchmarks.accuracy.detection", reason="needs the train extra")
    images = [
        {"id": i} | ({"split": "train" if i % 3 else "val"} if split else {}) for i in range(12)
    ]
    objects = [{"id": i, "image_id": i % 12, "category_id": i} for i in range(24)]
    coco = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": i, "name": str(i)} for i in range(24)],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(coco))

    def read(seed, photos, one_category):
        paths = detection.split_of(tmp_path, tmp_path, seed, photos, one_category)
        return [json.loads(path.read_text()) for path in paths]

    train, val = read(0, 5, True)
    assert len(train["images"]) == 5 and len(val["images"]) == (4 if split else 5)
    assert split or train["images"] == val["images"]
    for part in (train, val):
        ids = {image["id"] for image in part["images"]}
        assert sorted(item["id"] for item in part["annotations"]) == sorted(
            i for i in range(24) if i % 12 in ids
        )
        assert {item["category_id"] for item in part["annotations"]} == {1} and len(
            part["categories"]
        ) == 1
    assert read(1, 5, True)[0]["images"] != train["images"] == read(0, 5, False)[0]["images"]
    assert [len(part["images"]) for part in read(0, None, False)] == ([8, 4] if split else [12, 12])
    assert read(0, 99, False)[0]["categories"] == coco["categories"]


def test_random_tokens_are_drawn_by_the_seed(monkeypatch):
    classification = pytest.importorskip(
        "benchmarks.accuracy.classification", reason="needs the train extra"
    )
    model = cropr.apply(randomize(reference_vit()), rate=9)
    monkeypatch.setattr(
        classification.build, "task", lambda config, classes: SimpleNamespace(backbone=model)
    )
    drawn = []
    for seed in (3, 3, 4):
        task = classification.build_task(SimpleNamespace(seed=seed), "random")
        drawn.append(task.backbone.cropr[0](torch.ones(1, 65, model.embed_dim), 20, 1).kept_idx)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
