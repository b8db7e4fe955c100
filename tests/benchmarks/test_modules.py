"""What the benches that train need of their own: other scores in the place of Cropr's, photos of a data set."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import randomise, reference_vit

import cropr_kernels as cropr
from cropr_kernels.tasks import Classifier

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from rivals import SYSTEMS, Reduced
from rivals.stands import AttentionTopK


@pytest.mark.parametrize("llf", [False, True])
@torch.no_grad()
def test_attention_top_k_in_a_pruned_model_is_that_of_the_rivals(llf):
    model, images = randomise(reference_vit()).eval(), torch.randn(2, 3, 64, 64)
    counts = cropr.schedule.resolve(rate=9)(65, len(model.blocks), 1, llf)
    want = Reduced(model, SYSTEMS["attention top-k"], counts, llf=llf)(images)
    cropr.apply(model, rate=9, llf=llf)
    for layer, module in enumerate(model.cropr):
        model.cropr[layer] = AttentionTopK(module.query(), model.blocks[layer])
    torch.testing.assert_close(model(images), want)


def test_non_salient_keeps_what_cropr_would_drop_also_where_the_auxiliary_head_gives_the_scores():
    pytest.importorskip("timm", reason="needs the train extra")
    accuracy = pytest.importorskip("accuracy", reason="needs the train extra")
    model = cropr.apply(randomise(reference_vit()), rate=9)
    module, x = model.cropr[0], torch.randn(2, 65, model.embed_dim)
    dropped = module(x, 56, 1).pruned_idx
    module.__class__ = accuracy.NonSalient
    assert torch.equal(module(x, 10, 1).kept_idx[:, 1:].sort(1).values, dropped.sort(1).values)
    _, scores = module.train().predict(x)
    assert torch.equal(module(x, 10, 1, scores).kept_idx[:, 1:].sort(1).values, dropped.sort(1).values)
    losses = Classifier(model)(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    assert losses["aux"].isfinite()


@pytest.mark.parametrize("split", [True, False], ids=["split", "all for both"])
def test_photos_are_drawn_by_the_seed_and_objects_may_lose_their_category(split, tmp_path):
    pytest.importorskip("timm", reason="needs the train extra")
    detection = pytest.importorskip("detection", reason="needs the train extra")
    images = [{"id": i} | ({"split": "train" if i % 3 else "val"} if split else {}) for i in range(12)]
    objects = [{"id": i, "image_id": i % 12, "category_id": i} for i in range(24)]
    about = {"images": images, "annotations": objects, "categories": [{"id": i, "name": str(i)} for i in range(24)]}
    (tmp_path / "annotations.json").write_text(json.dumps(about))

    def read(seed, photos, one_category):
        paths = detection.split_of(tmp_path, tmp_path, seed, photos, one_category)
        return [json.loads(path.read_text()) for path in paths]

    train, val = read(0, 5, True)
    assert len(train["images"]) == 5 and len(val["images"]) == (4 if split else 5)
    assert split or train["images"] == val["images"]
    for part in (train, val):
        ids = {image["id"] for image in part["images"]}
        assert sorted(one["id"] for one in part["annotations"]) == sorted(i for i in range(24) if i % 12 in ids)
        assert {one["category_id"] for one in part["annotations"]} == {1} and len(part["categories"]) == 1
    assert read(1, 5, True)[0]["images"] != train["images"] == read(0, 5, False)[0]["images"]
    assert [len(part["images"]) for part in read(0, None, False)] == ([8, 4] if split else [12, 12])
    assert read(0, 99, False)[0]["categories"] == about["categories"]
