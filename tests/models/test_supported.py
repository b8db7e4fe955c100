"""The table of supported models: what it says of a model is what happens to it."""

import json
from pathlib import Path

import pytest
import torch
from helpers.extras import require
from helpers.models import randomize

from benchmarks.models.supported import check, small_timm_model
from benchmarks.models.towers import TOWERS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "supported_models.json"
ROWS = {(row["library"], row["name"]): row for row in json.loads(RESULTS.read_text())["rows"]}
# One model of each kind that timm has.
TIMM = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "convit_tiny",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "naflexvit_base_patch16_gap",
    "samvit_base_patch16_224",
    "test_vit4",
    "vit_base_patch16_sapiens2",
    "vit_base_patch16_rpn_224",
    "vit_relpos_small_patch16_224",
    "vit_small_patch16_18x2_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "vit_wee_patch16_reg1_gap_256",
    "vit_xsmall_patch16_clip_224",
    "vitamin_small_224",
    "xcit_nano_12_p16_224",
]
# Of Hugging Face those that together take every branch of the package that any of all takes.
BRANCHES = {
    "audio_spectrogram_transformer", "beit", "bridgetower", "deit", "dpt", "eomt_dinov3", "gemma4",
    "groupvit", "hiera", "idefics/vision", "janus", "kosmos2_5", "llama4", "lw_detr",
    "phi4_multimodal", "pixtral", "rf_detr", "sam3", "sam_hq", "sapiens2", "siglip2", "swin",
    "timesformer", "videomae", "videomt", "vit_mae", "vitdet", "x_clip",
}  # fmt: skip


def test_the_towers_that_make_test_tries_exist():
    assert {tower.architecture for tower in TOWERS} >= BRANCHES


@pytest.mark.parametrize(
    "tower",
    [
        pytest.param(tower, marks=[] if tower.architecture in BRANCHES else pytest.mark.slow)
        for tower in TOWERS
    ],
    ids=lambda tower: tower.architecture,
)
def test_hugging_face_models_do_what_the_table_says(tower):
    require("transformers")
    torch.manual_seed(0)
    try:
        model = tower.make()
    except (ImportError, AttributeError) as error:
        pytest.skip(f"not in this version of transformers: {error}")
    assert_as_in_table("transformers", tower.architecture.partition("/")[0], model)


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_do_what_the_table_says(name):
    require("timm")
    torch.manual_seed(0)
    assert_as_in_table("timm", name, small_timm_model(name))


def assert_as_in_table(library, name, model):
    row = ROWS[library, name]
    verdict = check(randomize(model))
    assert verdict.supported == row["supported"], f"{name}: {verdict.reason or 'supported'}"
    for column in ("engine", "merges", "calibrates", "masking"):
        assert (getattr(verdict, column) == "yes") == (row[column] == "yes"), (
            f"{name}, {column}: {verdict}"
        )


def test_the_goal_of_supported_names_is_kept():
    assert sum(row["supported"] for row in ROWS.values() if row["library"] == "timm") >= 330
    assert sum(row["supported"] for row in ROWS.values() if row["library"] == "transformers") >= 65


def test_dropping_is_masking_in_all_models_but_those_whose_attention_shows_why_not():
    others = {
        row["name"]
        for row in ROWS.values()
        if row["supported"] and row.get("masking", "yes") != "yes" and "cait" not in row["name"]
    }
    assert others == {"x_clip"}  # its attention sees a message of the frames too
