"""Defaults of a run: calibrated queries, the dtype of autocast, the choice between weights and
their average."""

import io
import json

import pytest
import torch
from helpers.extras import require
from helpers.runs import Broken

import cropr_kernels as cropr
from cropr_kernels.train import PRESETS, Config, build, loop, precision, train
from cropr_kernels.train.data import Data, Samples, load_data
from cropr_kernels.train.loop import rebuild
from cropr_kernels.utils.timing import Timing

require("torchmetrics")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = Config(
    model_options=("depth=4", "embed_dim=48", "num_heads=2", "mlp_ratio=2.0"), patch_size=8,
    img_size=(32, 32), rate=3,
    batch_size=8, epochs=1, workers=0, log_steps=1, device="cpu", lr=1e-3,
)  # fmt: skip


class Noise(Broken):
    """Distinct images of two classes."""

    def __getitem__(self, index):
        return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index)), index % 2


DATA = Data(Noise(40, set()), Noise(16, set()), ["blue", "red"])


def notes(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["note"] for line in lines if "note" in line]


def write_images(folder, images):
    """Write (label, picture) pairs into a folder per class, every third one for validation; return
    the path."""
    for index, (label, picture) in enumerate(images):
        path = folder / ("train" if index % 3 else "val") / str(label) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return str(folder)


def test_splits_of_other_classes_and_models_that_cannot_be_trained_are_named(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs the train extra")
    blank = image.new("RGB", (8, 8))
    data = write_images(tmp_path / "data", [("a", blank), ("b", blank), ("c", blank)])
    with pytest.raises(ValueError, match="train and val have different classes: a, b, c"):
        load_data(Config(data=data))
    with pytest.raises(ValueError, match="a preset of cropr_kernels or a timm model, got 'vit_b_1"):
        build.task(Config(model="vit_b_16"), 2)
    if "test_vit" in pytest.importorskip("timm").list_models("test_vit"):
        config = Config(model="test_vit", pretrained=False, img_size=(64, 96), rate=1)
        model = build.task(config, 2).backbone
        assert model.patch_embed.img_size == (64, 96) and not model.patch_embed.strict_img_size


def test_workers_need_a_short_temporary_path_for_their_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 120)))
    with pytest.raises(
        ValueError, match=r"at most 75 bytes, got .*xxx: set TMPDIR to another, or workers=0"
    ):
        train(SMALL.changed(workers=1), tmp_path / "run", data=DATA, show=False)


@pytest.mark.slow
def test_40_steps_of_the_preset_on_digits_are_far_above_chance(tmp_path):
    """A new head on a backbone trained for 160 steps; an average that starts too slowly is no
    better than chance."""
    digits = pytest.importorskip("sklearn.datasets", reason="needs the demo extra").load_digits()
    image = pytest.importorskip("PIL.Image", reason="needs the train extra")
    pictures = (digits.images[:1200] * 15.9).astype("uint8")
    pairs = (
        (label, image.fromarray(picture).resize((32, 32)))
        for label, picture in zip(digits.target, pictures)
    )
    config = PRESETS["finetune"].changed(
        data=write_images(tmp_path, pairs), model_options=SMALL.model_options, pretrained=False,
        rate=3, flip=0.0,
        model="vit_tiny_patch16_224", patch_size=4, img_size=(32, 32), calibrate=64, batch_size=40,
        epochs=2,
        warmup_epochs=0.2, lr=2e-3, workers=0, device="cpu",
    )  # fmt: skip
    plain = config.changed(
        rate=None,
        merge=False,
        ema=0.0,
        layer_decay=1.0,
        drop_path=0.0,
        scale=(0.9, 1.0),
        epochs=8,
        eval_epochs=8,
        lr=3e-3,
    )
    before, task = loop.build.task(plain, 10), loop.build.task(config, 10)
    train(plain, tmp_path / "before", task=before, show=False)
    learned = {
        name: value
        for name, value in before.backbone.state_dict().items()
        if not name.startswith("head.")
    }
    assert not task.backbone.load_state_dict(learned, strict=False).unexpected_keys
    reached = train(config, tmp_path / "run", task=task, show=False)
    assert max(reached["weights"], reached["average"]) == reached["top-1"] >= 60, reached
    assert min(reached["weights"], reached["average"]) >= 50, reached


@pytest.mark.slow
def test_40_steps_of_the_preset_on_photos_are_far_above_chance(data, tmp_path):
    numpy = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image", reason="needs the train extra")
    photos = numpy.load(data / "imagenette_160.npz")
    buffer, offsets, labels = (photos[name] for name in ("buf", "offsets", "labels"))
    chosen = [i for label in range(10) for i in numpy.flatnonzero(labels == label)[:36]]
    pairs = (
        (labels[i], image.open(io.BytesIO(buffer[offsets[i] : offsets[i + 1]].tobytes())))
        for i in chosen
    )
    config = PRESETS["finetune"].changed(
        data=write_images(tmp_path, ((label, photo.convert("RGB")) for label, photo in pairs)),
        img_size=(160, 160), batch_size=12, epochs=2, eval_epochs=2,
        weights=str(data / "vit_tiny_p16_224_tin200_fp16.safetensors"), workers=0, device="cpu",
    )  # fmt: skip
    reached = train(config, tmp_path / "run", show=False)
    assert reached["top-1"] >= 50, reached
    assert min(reached["weights"], reached["average"]) >= 30, reached
    assert (
        notes(tmp_path / "run")[1]
        == "queries calibrated on 128 training photos (calibrate=0: random ones)"
    )


def test_a_pretrained_network_starts_from_calibrated_queries_of_its_own_photos(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(loop.Run, "run", lambda self: self.task)
    weights = tmp_path / "weights.pt"
    torch.save(cropr.create_vit("eva02_tiny_patch14_224", num_classes=7).state_dict(), weights)
    config = Config(
        weights=str(weights),
        img_size=(56, 56),
        rate=1,
        batch_size=8,
        workers=0,
        device="cpu",
        grad_checkpointing=True,
    )
    data = Data(*(Large(part.count, set()) for part in DATA[:2]), DATA.classes)
    tasks = [train(config, tmp_path / name, data=data, show=False) for name in ("one", "two")]
    assert notes(tmp_path / "one") == [
        "queries calibrated on 40 training photos (calibrate=0: random ones)"
    ]
    fresh = loop.build.task(config, 2)
    images = torch.stack([Samples(data.train, config.seed)[-1, i].image for i in range(40)])
    cropr.calibrate(fresh.backbone, images)
    for first, second, expected in zip(
        *(task.backbone.cropr for task in tasks), fresh.backbone.cropr
    ):
        assert torch.equal(first.queries, second.queries)
        torch.testing.assert_close(first.query(), expected.query(), rtol=1e-4, atol=1e-5)
    for name, options, task in [
        ("asked for", {"calibrate": 0}, None),
        ("unpruned", {"rate": None}, None),
        ("given", {}, loop.build.task(config, 2)),
    ]:
        train(config.changed(**options), tmp_path / name, data=data, task=task, show=False)
        assert notes(tmp_path / name) == []
    assert SMALL.calibration_photos == 0 and PRESETS["coco-eva02-l-1536"].calibration_photos == 0
    assert PRESETS["finetune"].calibration_photos == 128


class Large(Noise):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.repeat(1, 2, 2)[:, :56, :56], label


def test_calibration_photos_come_from_the_full_dataset(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        loop,
        "calibrate",
        lambda model, batches: seen.extend(
            int(image[0, 0, 0]) for batch in batches for image in batch
        ),
    )
    monkeypatch.setattr(loop.Run, "run", lambda self: {})
    data = Data(Broken(300, set()), *DATA[1:])
    train(SMALL.changed(calibrate=20), tmp_path, data=data, show=False)
    assert len(set(seen)) == 20 and min(seen) < 100 and max(seen) >= 200


def test_the_dtype_of_autocast_is_measured_once(tmp_path, monkeypatch, capsys):
    config = SMALL.changed(amp="auto", save_steps=2)
    monkeypatch.setattr(loop, "measured_amp", lambda device: ("bfloat16", "it is fast"))
    reached = train(config, tmp_path, data=DATA)
    assert "amp=auto is amp=bfloat16: it is fast" in capsys.readouterr().err.splitlines()
    assert notes(tmp_path) == ["amp=auto is amp=bfloat16: it is fast"]
    assert (
        Config.read(tmp_path / "config.json")
        == config.changed(amp="bfloat16")
        == rebuild(tmp_path)[1]
    )
    monkeypatch.setattr(loop, "measured_amp", lambda device: pytest.fail("measured again"))
    assert train(config, tmp_path, data=DATA, show=False) == reached and len(notes(tmp_path)) == 1
    with pytest.raises(ValueError, match="holds another run: amp: 'none', not 'bfloat16'"):
        train(config.changed(amp="none"), tmp_path, data=DATA, show=False)


def test_bfloat16_is_chosen_if_it_is_measured_to_be_faster(monkeypatch):
    device = torch.device("cpu")
    assert precision.measured_amp(device)[0] in ("none", "bfloat16")
    for gain, verdict in [(2.0, "bfloat16"), (1.1, "none"), (1 / 46, "none")]:
        times = {"bfloat16": Timing(1.0, 1.0, 1.0), "float32": Timing(gain, gain, gain)}
        monkeypatch.setattr(precision, "time_interleaved", lambda *_, times=times, **__: times)
        assert precision.measured_amp(device) == (
            verdict,
            f"bfloat16 is {gain:.2g} times as fast as float32 here",
        )


@pytest.mark.parametrize(("supported", "verdict"), [(True, "bfloat16"), (False, "none")])
def test_bfloat16_is_chosen_on_gpus_that_have_it(supported, verdict, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    amp, reason = precision.measured_amp(torch.device("cuda"))
    assert amp == verdict and reason == f"the GPU has {'' if supported else 'no '}bfloat16"


def test_float16_scales_the_loss_and_skips_steps_of_infinite_gradients(tmp_path):
    config = SMALL.changed(amp="float16")
    assert train(config, tmp_path, data=DATA, show=False)["images"] == 16
    last = torch.load(tmp_path / "last.pt")
    assert last["scaler"]["scale"] > 1 and all(
        value.isfinite().all() for value in last["model"].values()
    )


@pytest.mark.parametrize(
    ("best", "tops"),
    [("weights", (60.0, 50.0)), ("average", (50.0, 60.0)), ("weights", (60.0, 60.0))],
)
def test_the_weights_and_their_average_are_evaluated_and_the_better_is_kept(
    best, tops, tmp_path, monkeypatch
):
    accuracies = iter(tops)
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"top-1": next(accuracies)})
    reached = train(SMALL.changed(ema=0.99), tmp_path, data=DATA, show=False)
    assert reached == {"top-1": 60.0, "of": best, "weights": tops[0], "average": tops[1]}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["val"] == reached
    kept, last = torch.load(tmp_path / "best.pt"), torch.load(tmp_path / "last.pt")
    average = {name.removeprefix("module."): value for name, value in last["ema"].items()}
    assert kept["metrics"] == reached
    assert all(
        torch.equal(kept["model"][name], (last["model"] if best == "weights" else average)[name])
        for name in average
    )
    assert not all(torch.equal(last["model"][name], average[name]) for name in average)


def test_the_average_forgets_the_first_weights(tmp_path):
    """Its decay rises from 0: after a few steps it is near the current weights."""
    task = loop.build.task(SMALL, 2)
    first = {name: value.clone() for name, value in task.state_dict().items()}
    train(SMALL.changed(ema=0.9999, epochs=4), tmp_path, data=DATA, task=task, show=False)
    last = torch.load(tmp_path / "last.pt")
    moved = {name: (last["model"][name] - first[name]).norm() for name in first}
    lag = {name: (last["ema"][f"module.{name}"] - last["model"][name]).norm() for name in first}
    assert sum(lag.values()) < 0.5 * sum(moved.values())
