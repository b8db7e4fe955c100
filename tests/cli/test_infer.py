"""`cropr infer`: photos and shards into Parquet, interrupted, resumed, by one process and by
two."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from helpers.processes import run_forked

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.utils.images import find_photos, load_photo

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
dataset = pytest.importorskip("pyarrow.dataset", reason="pyarrow is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

ROOT = Path(__file__).parents[2]
PHOTOS = find_photos(ROOT / "examples" / "photos")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the arguments that name a small model, and the model."""
    torch.manual_seed(0)
    folder, plain = (
        tmp_path_factory.mktemp("model"),
        cropr.create_vit("vit_tiny_patch16_224", num_classes=5),
    )
    torch.save(plain.state_dict(), folder / "tiny.pt")
    pruned = cropr.apply(plain, rate=8, num_outputs=0)
    cropr.save_queries(pruned, folder / "queries.safetensors")
    return [
        str(folder / "tiny.pt"),
        "--queries",
        str(folder / "queries.safetensors"),
        "--quiet",
    ], cropr.deploy(pruned)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(ROOT / "examples" / "photos", folder / "below")
    (folder / "broken.jpg").write_text("no image")
    return folder


def results(out):
    rows = dataset.dataset(out, format="parquet").to_table().to_pylist()
    return {row["name"]: row for row in rows}


def test_a_folder_becomes_classes_and_errors(model, photos, tmp_path, capsys):
    arguments, fast = model
    more = ["--out", str(tmp_path / "out"), "--unit", "3", "--top", "2"]
    assert cli.main(["infer", *arguments, str(photos), *more]) == 0
    printed = capsys.readouterr().out
    assert (
        f"3 units; {len(PHOTOS) + 1} photos, 1 of them unreadable" in printed
        and "all 3 units are there" in printed
    )
    rows = results(tmp_path / "out")
    assert len(rows) == len(PHOTOS) + 1
    assert (
        "cannot identify image file" in rows["broken.jpg"]["error"]
        and rows["broken.jpg"]["classes"] is None
    )
    for path in PHOTOS:
        row = rows[f"below/{path.name}"]
        best = fast((load_photo(path)[None] - 0.5) / 0.5).softmax(1).topk(2)
        assert row["classes"] == best.indices[0].tolist() and row["error"] is None
        assert row["probabilities"] == pytest.approx(best.values[0].tolist(), abs=1e-4)


def write_shard(path, samples):
    with tarfile.open(path, "w") as shard:
        for name, file in samples:
            shard.add(file, name)


def test_shards_give_the_results_of_their_photos(model, photos, tmp_path):
    arguments, _ = model
    shards = tmp_path / "shards"
    shards.mkdir()
    (tmp_path / "label.cls").write_text("3")
    for index in range(2):
        pairs = [
            ((path.name, path), (f"{path.stem}.cls", tmp_path / "label.cls"))
            for path in PHOTOS[index::2]
        ]
        write_shard(shards / f"{index}.tar", [file for pair in pairs for file in pair])
    write_shard(
        shards / "2.tar",
        [("lonely.cls", tmp_path / "label.cls"), ("bad.jpg", photos / "broken.jpg")],
    )
    assert cli.main(["infer", *arguments, str(shards), "--out", str(tmp_path / "a")]) == 0
    assert cli.main(["infer", *arguments, str(photos), "--out", str(tmp_path / "b")]) == 0
    ours, theirs = results(tmp_path / "a"), results(tmp_path / "b")
    assert (
        ours["lonely"]["error"] == "no image in this sample"
        and "cannot identify" in ours["bad.jpg"]["error"]
    )
    for path in PHOTOS:
        shard_row, photo_row = ours[path.name], theirs[f"below/{path.name}"]
        assert shard_row["classes"] == photo_row["classes"]
        assert shard_row["probabilities"] == pytest.approx(photo_row["probabilities"], abs=1e-4)


def test_photos_of_one_name_are_told_apart_by_their_source_and_a_source_counts_once(
    model, photos, tmp_path
):
    arguments, _ = model
    folders = tmp_path / "a", tmp_path / "b"
    for folder, photo in zip(folders, PHOTOS):
        folder.mkdir()
        shutil.copy(photo, folder / "000.jpg")
        write_shard(folder / "0.tar", [("000.jpg", photo)])
    sources = list(map(str, [*folders, folders[0], folders[1] / "0.tar"]))
    assert cli.main(["infer", *arguments, *sources, "--out", str(tmp_path / "out")]) == 0
    rows = dataset.dataset(tmp_path / "out", format="parquet").to_table().to_pylist()
    answers = {(row["source"], row["name"]): row["probabilities"] for row in rows}
    expected = {(str(path), "000.jpg") for folder in folders for path in (folder, folder / "0.tar")}
    assert len(rows) == len(answers) == 4 and answers.keys() == expected
    first, second = (answers[str(folder), "000.jpg"] for folder in folders)
    assert first != second and answers[sources[-1], "000.jpg"] == pytest.approx(second)


@pytest.mark.parametrize("prunes", [True, False], ids=["pruned", "unpruned"])
def test_a_changed_model_of_the_same_name_is_refused(prunes, photos, tmp_path, capsys):
    torch.manual_seed(0)
    folder, out = tmp_path / "model", tmp_path / "out"
    plain = cropr.apply(
        cropr.create_vit("vit_tiny_patch16_224", num_classes=5), rate=8, num_outputs=0
    )
    cropr.save(plain, folder)
    command = [
        "infer",
        str(folder),
        str(photos),
        *["--rate", "0"][: 0 if prunes else 2],
        "--quiet",
        "--out",
        str(out),
    ]
    for more in ([], ["--features"]):  # features do not depend on the head
        cropr.save(plain, folder)
        assert cli.main([*command, *more]) == 0
        next(out.glob("*.parquet")).unlink()
        with torch.no_grad():
            plain.head.weight[0, 0] += 1
        cropr.save(plain, folder)
        assert cli.main([*command, *more]) == (0 if more else 1)
        assert more or re.search(
            r"holds the results of another run: weights was \w+, is \w+$", capsys.readouterr().err
        )
        shutil.rmtree(out)


def test_features_are_written_instead_of_classes(model, photos, tmp_path):
    arguments, fast = model
    assert (
        cli.main(["infer", *arguments, str(photos), "--out", str(tmp_path / "out"), "--features"])
        == 0
    )
    row = results(tmp_path / "out")[f"below/{PHOTOS[0].name}"]
    expected = fast.forward_features((load_photo(PHOTOS[0])[None] - 0.5) / 0.5)[0, 0]
    assert row["features"] == pytest.approx(expected.tolist(), abs=1e-3) and "classes" not in row


def test_a_run_resumes_and_other_settings_raise(model, photos, tmp_path, capsys):
    arguments, _ = model
    out = tmp_path / "out"
    command = ["infer", *arguments, str(photos), "--out", str(out), "--unit", "3"]
    assert cli.main(command) == 0
    before, times = results(out), {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    (out / "part-00001.parquet").unlink()
    (out / ".0123abcd.part-00001.parquet").write_text("half of it")
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "1 units, 2 were there; 3 photos" in capsys.readouterr().out
    assert results(out) == before
    assert all(
        path.stat().st_mtime_ns == time
        for path, time in times.items()
        if path.name != "part-00001.parquet"
    )
    for more, message in (
        (["--rate", "9"], "schedule was rate=8, is rate=9"),
        (["--top", "1"], "top was 5, is 1"),
        (["--unit", "4"], "units was 3, is 2"),
    ):
        assert cli.main([*command, *more]) == 1
        assert f"{out} holds the results of another run: {message}" in capsys.readouterr().err
    for damaged in ("[1]", "{", "\0\0"):
        (out / "_settings.json").write_text(damaged)
        assert cli.main(command) == 1
        assert "_settings.json is damaged: " in capsys.readouterr().err


# Kills itself when argv[1] parts are written, before the last is renamed to its final name.
KILLED = """
import os, signal, sys
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.utils import io
publish, named = io.publish, []
def counted(temporary, path):
    named.extend([path] if path.suffix == ".parquet" else [])
    if len(named) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    publish(temporary, path)
io.publish = counted
cli.main(sys.argv[2:])
"""


def test_a_killed_run_resumes_without_loss(model, photos, tmp_path):
    arguments, _ = model
    for index in range(3):
        shutil.copytree(ROOT / "examples" / "photos", photos / f"more{index}")
    uninterrupted, out = tmp_path / "whole", tmp_path / "out"
    command = ["infer", *arguments, str(photos), "--unit", "2", "--batch", "2", "--out"]
    assert cli.main([*command, str(uninterrupted)]) == 0
    for parts in (2, 1):
        ended = run_forked(KILLED, [str(parts), *command, str(out)], tmp_path / f"printed{parts}")
        assert ended.returncode == -signal.SIGKILL and not (out / "_SUCCESS").exists()
    assert len(list(out.glob("part-*.parquet"))) == 1 and len(list(out.glob(".*.parquet"))) == 2
    assert cli.main([*command, str(out)]) == 0
    assert (out / "_SUCCESS").exists() and results(out) == results(uninterrupted)


@pytest.mark.slow
def test_two_processes_share_the_units(model, photos, tmp_path):
    arguments, _ = model
    command = ["infer", *arguments, str(photos), "--unit", "3", "--out"]
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
    ]
    done = subprocess.run(
        [*launch, "-m", "cropr_kernels.cli", *command, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: 2 units" in done.stdout and "process 1 of 2: 1 units" in done.stdout
    alone, shared = results(tmp_path / "one"), results(tmp_path / "two")
    assert alone.keys() == shared.keys()
    for name, row in alone.items():
        assert row["classes"] == shared[name]["classes"] and row["error"] == shared[name]["error"]
    assert (tmp_path / "two" / "_SUCCESS").exists()


def test_processes_of_one_run_take_turns_and_the_last_one_ends_it(
    model, photos, tmp_path, capsys, monkeypatch
):
    arguments, _ = model
    command = ["infer", *arguments, str(photos), "--unit", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        assert not (tmp_path / "out" / "_SUCCESS").exists()
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(command) == 0
        printed = capsys.readouterr().out
        assert f"process {rank} of 2: " in printed
        assert ("units are there" in printed) == (rank == 1)
    assert len(results(tmp_path / "out")) == len(PHOTOS) + 1


def test_missing_sources_damaged_shards_and_libraries_are_named(
    model, photos, tmp_path, capsys, monkeypatch
):
    arguments, _ = model

    def error(*more):
        assert cli.main(["infer", *arguments, "--out", str(tmp_path / "out"), *map(str, more)]) == 1
        return capsys.readouterr().err

    assert "there is no folder or shard" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no photos and no shards in" in error(tmp_path / "empty")
    assert "a source must be a folder, a WebDataset shard (.tar) or a .parquet file" in error(
        PHOTOS[0]
    )
    (tmp_path / "torn.tar").write_bytes(b"x" * 2000)
    assert "torn.tar" in error(tmp_path / "torn.tar")
    table = pyarrow.table({"left": [b""], "right": [b""]})
    parquet.write_table(table, tmp_path / "two.parquet")
    assert "must have one column of bytes, or of structs with bytes, has left, right" in error(
        tmp_path / "two.parquet", "--out", tmp_path / "columns"
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "cropr infer: needs pyarrow: pip install pyarrow (or the extra [infer] of" in error(
        photos
    )


def test_the_ray_engine_without_ray_names_its_extra(model, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["infer", *model[0], str(photos), "--out", str(tmp_path / "out"), "--engine", "ray"]
    assert cli.main(command) == 1
    assert "needs ray: pip install ray (or the extra [ray] of" in capsys.readouterr().err


def test_bench_measures_after_checking_the_engine(tmp_path, capsys, monkeypatch):
    out = tmp_path / "bench"
    arguments = [
        "bench",
        "vit_tiny_patch16_224",
        "--batch",
        "1",
        "--rates",
        "4",
        "12",
        "--rounds",
        "1",
        "--quiet",
    ]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.with_suffix(".json").read_text())
    assert [row["rate"] for row in written["rows"]] == [0, 4, 12] and written[
        "engine"
    ] == "zero-copy"
    plain, gentle, steep = written["rows"]
    assert (
        plain["speedup"] == 1
        and steep["flop_ratio"] > gentle["flop_ratio"] > plain["flop_ratio"] == 1
    )
    assert out.with_suffix(".png").stat().st_size > 5000 and "FLOP ratio" in printed
    from cropr_kernels.cli import bench as benching

    def unable(*_):
        raise ImportError("a picture needs matplotlib")

    with monkeypatch.context() as patch:
        patch.setattr(benching, "save_speed_curves", unable)
        assert cli.main([*arguments, "--out", str(out)]) == 0
    assert "no picture: a picture needs matplotlib" in capsys.readouterr().out
    monkeypatch.setattr(benching, "_TOLERANCE", {torch.float32: -1.0, torch.float64: -1.0})
    assert cli.main([*arguments, "--out", str(out)]) == 1
    assert "at rate 0 the engine differs from the functional ops" in capsys.readouterr().err


def test_bench_distinguishes_near_ties_from_faults(monkeypatch):
    from cropr_kernels.cli import bench as benching

    torch.manual_seed(0)
    model = cropr.apply(
        cropr.create_vit("vit_tiny_patch16_224", img_size=64, depth=3).eval(), rate=4, merge=True
    )
    images = torch.randn(2, 3, 64, 64)
    monkeypatch.setattr(benching, "_TOLERANCE", {torch.float32: -1.0, torch.float64: 1e-9})
    options = dict(graphs=False, rounds=1, show=False)
    # All differ in float32, none in float64
    assert len(benching.measure(model, images, [0, 4], **options)) == 2
    plain = benching.deployed_copy

    def another(model, engine=True, **more):
        """Return the model, with other weights if it runs on the functional ops."""
        deployed = plain(model, engine=engine, **more)
        if not engine:
            deployed.head.weight.data *= 2
        return deployed

    monkeypatch.setattr(benching, "deployed_copy", another)
    with pytest.raises(RuntimeError, match="at rate 0 the engine differs from the functional ops"):
        benching.measure(model, images, [0, 4], **options)
