"""The predictor: every type of photo, a row for each, its settings only in a pickle."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from helpers.inference import PHOTOS, contents, save_model, table_of, write_folder

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.inference import predictor as module

np = pytest.importorskip("numpy", reason="numpy is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def assert_equal(results, expected):
    assert results.keys() == expected.keys()
    for name in results:
        np.testing.assert_array_equal(results[name], expected[name])


@pytest.mark.parametrize("options", [{"top": 2}, {"features": True}], ids=["classes", "features"])
def test_the_rows_are_those_that_infer_writes(options, model, tmp_path):
    photos = contents(7, broken=(2, 5))
    folder = write_folder(tmp_path / "photos", photos)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words = [word for word in words if word != "True"]
    command = ["infer", model, str(folder), "--batch", "3", "--quiet", *words]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    rows = table_of(tmp_path / "out").to_pylist()
    results = cropr.Predictor(model, batch_size=3, **options)(photos.values(), names=photos)
    columns = ["name", "error", *(["features"] if "features" in options else ())]
    assert set(rows[0]) - {"source"} == set(results) and set(columns) <= set(results)
    for index, row in enumerate(rows):
        assert results["name"][index] == row["name"] and results["error"][index] == row["error"]
        for name in results.keys() - {"name", "error"}:
            values = results[name][index]
            if row["error"] is None:
                assert values.tolist() == row[name]
            else:
                assert row[name] is None
                assert (values == -1).all() if name == "classes" else np.isnan(values).all()


def test_a_photo_may_be_bytes_an_array_an_image_a_file_or_a_path(model):
    predictor = cropr.Predictor(model)
    with Image.open(PHOTOS[0]) as photo:
        image = photo.convert("RGB")
    content = PHOTOS[0].read_bytes()
    photos = [content, bytearray(content), memoryview(content), np.asarray(image), image]
    photos += [io.BytesIO(content), str(PHOTOS[0]), PHOTOS[0]]
    results = predictor(photos)
    assert set(results["error"]) == {None}
    assert len({tuple(classes) for classes in results["classes"].tolist()}) == 1
    assert results["classes"].shape == results["probabilities"].shape == (8, 5)
    assert results["classes"].dtype == np.int32 and results["probabilities"].dtype == np.float32
    image.load()  # it stays open


def test_whatever_is_wrong_with_a_photo_is_a_row(model):
    wrong = [
        b"",
        b"no photo",
        None,
        3,
        np.zeros((4, 4, 7), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ]
    wrong += ["nowhere.jpg", Path("nowhere"), Image.new("F", (4, 4), float("nan")), object()]
    good = PHOTOS[0].read_bytes()
    predictor = cropr.Predictor(model, batch_size=4)
    results = predictor([good, *wrong, good])
    errors = results["error"].tolist()
    assert errors[0] is errors[-1] is None and all(errors[1:-1])
    assert errors[2:5] == [
        "cannot identify image file",  # without the address of an object, which no two runs share
        "no image in this sample",
        "a photo must be bytes, an array, an image, a file or a path, got int",
    ]
    assert_equal(
        {name: values[1:-1] for name, values in results.items()}, predictor(wrong)
    )  # without a readable photo too
    empty = predictor([])
    assert {name: values.shape for name, values in empty.items()} == {
        "error": (0,),
        "classes": (0, 5),
        "probabilities": (0, 5),
    }


def test_a_pickle_holds_settings_and_a_process_loads_a_model_once(model, monkeypatch):
    loads = []
    plain = module.load_with_queries
    monkeypatch.setattr(
        module, "load_with_queries", lambda *args, **more: loads.append(1) or plain(*args, **more)
    )
    predictor = cropr.Predictor(model, top=3)
    assert not loads
    photo = [PHOTOS[0].read_bytes()]
    expected = predictor(photo)
    content = pickle.dumps(predictor)
    assert len(content) < 1000
    for _ in range(3):
        assert_equal(pickle.loads(content)(photo), expected)
    assert len(loads) == 1
    cropr.Predictor(model, top=4)(photo)
    assert len(loads) == 2


def test_a_model_that_has_changed_on_disk_is_loaded_again(tmp_path):
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        plain = cropr.create_vit("vit_tiny_patch16_224", depth=3, num_classes=5)
        cropr.save(cropr.apply(plain, rate=8, num_outputs=0), tmp_path / "model")
        results.append(cropr.Predictor(tmp_path / "model")([PHOTOS[0]])["probabilities"])
    assert (results[0] != results[1]).any()


def test_illegal_options_raise(model, tmp_path):
    plain = cropr.create_vit("vit_tiny_patch16_224", num_classes=5)
    torch.save(plain.state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(TypeError, match=r"Predictor: options must be among arch, .* got batch$"):
        cropr.Predictor(model, batch=3)
    with pytest.raises(ValueError, match="Predictor: batch_size must be >= 1, got 0"):
        cropr.Predictor(model, batch_size=0)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got 'int8'"):
        cropr.Predictor(model, dtype="int8")
    with pytest.raises(TypeError, match=r"mean must be a plain value or a list, got {'red'"):
        cropr.Predictor(model, mean={"red": 0.5})([])
    with pytest.raises(ValueError, match="without queries tokens would be pruned at random"):
        cropr.Predictor(tmp_path / "tiny.pt", rate=8)([])
