"""`cropr infer --engine ray` on a cluster of two nodes: the parts of the plain engine, whatever
dies."""

import os
import re
import signal
import sys
import threading
import time

import pytest
from helpers.extras import require
from helpers.inference import (
    contents,
    save_model,
    table_of,
    write_folder,
    write_parquet,
    write_shard,
)

from cropr_kernels.cli import __main__ as cli
from cropr_kernels.cli import infer
from cropr_kernels.inference import parts
from cropr_kernels.inference.predictor import Predictor

require("ray", "pandas", "pyarrow", "PIL")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes in this machine, each with one CPU."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else Ray writes a token into the home folder
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 100 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=options)
    nodes.second = nodes.add_node(**options)
    ray.init(address=nodes.address, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes cannot import tests
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command on ten photos in a folder, some in a shard and some in Parquet, two broken."""
    folder = tmp_path_factory.mktemp("inputs")
    photos = contents(20, broken=(3, 12))
    named = list(photos.items())
    write_folder(folder / "photos", dict(named[:12]))
    write_shard(folder / "0.tar", dict(named[12:16]))
    write_parquet(folder / "0.parquet", dict(named[16:]))
    sources = [str(folder / name) for name in ("photos", "0.tar", "0.parquet")]
    return ["infer", save_model(folder), *sources, "--unit", "2", "--batch", "2", "--quiet"]


@pytest.fixture(scope="module")
def plain(command, tmp_path_factory):
    """The folder that the plain engine writes."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert cli.main([*command, "--out", str(out)]) == 0
    assert table_of(out)["error"].null_count == 18
    return out


def assert_same(out, plain):
    assert table_of(out).equals(table_of(plain))
    names = [{path.name for path in folder.iterdir()} for folder in (out, plain)]
    assert names[0] == names[1]
    assert (out / "_settings.json").read_text() == (plain / "_settings.json").read_text()


def test_ray_writes_the_rows_of_the_plain_engine_and_both_resume_a_run(
    cluster, command, plain, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # nodes were started elsewhere
    out = tmp_path / "out"
    run = [*command, "--engine", "ray", "--out", "out"]
    assert cli.main(run) == 0
    printed = capsys.readouterr().out
    assert "8 units; 20 photos, 2 of them unreadable" in printed and "all 8 units" in printed
    assert_same(out, plain)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    for engine in ("ray", "plain"):
        for index in (1, 6):
            (out / f"part-{index:05d}.parquet").unlink()
        assert cli.main([*command, "--engine", engine, "--out", "out"]) == 0
        assert "2 units, 6 were there; 6 photos" in capsys.readouterr().out
        assert_same(out, plain)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert {name for name in times if times[name] != kept[name]} == {
        "part-00001.parquet",
        "part-00006.parquet",
    }
    assert cli.main([*run, "--top", "1"]) == 1
    assert "holds the results of another run: top was 5, is 1" in capsys.readouterr().err


def test_a_damaged_shard_is_named_and_the_others_are_done(cluster, command, tmp_path, capsys):
    shard = tmp_path / "torn.tar"
    shard.write_bytes(b"x" * 2000)
    out = tmp_path / "out"
    assert cli.main([*command, str(shard), "--engine", "ray", "--out", str(out)]) == 1
    assert re.search(r"1 units failed, all others are done: .*torn.tar", capsys.readouterr().err)
    assert len(table_of(out)) == 20 and not (out / "_SUCCESS").exists()


class OtherPredictor(Predictor):
    """A predictor with other weights wherever it is loaded again."""

    folder = None

    def describe(self):
        try:
            (self.folder / "first").touch(exist_ok=False)
        except FileExistsError:
            return super().describe() | {"weights": "others"}
        return super().describe()


def test_an_actor_with_other_weights_is_refused(cluster, command, tmp_path, monkeypatch, capsys):
    def make(*args, **options):
        predictor = OtherPredictor(*args, **options)
        predictor.folder = tmp_path
        return predictor

    monkeypatch.setattr(infer, "Predictor", make)
    assert cli.main([*command, "--engine", "ray", "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert re.search(
        r"the model must be the same on every node: weights was \w+, is others", message
    )
    assert not list((tmp_path / "out").glob("part-*"))


# Where an actor dies: while the model is loaded, at a batch of a unit, before and after the rename
MOMENTS = ["load", "load", "read 0", "read 1", "read 3", "computed 0", "computed 1", "computed 1"]
MOMENTS += ["before write", "after write"]


class DyingPredictor(Predictor):
    """A predictor whose process is killed once at each moment; files in `folder` count them."""

    folder = None

    def die(self, moment):
        for index, name in enumerate(MOMENTS):
            if name == moment:
                try:
                    (self.folder / str(index)).touch(exist_ok=False)
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)

    def describe(self):
        if parts.write_complete is not self.write:
            self.written = parts.write_complete
            parts.write_complete = self.write
            self.photos = self.batches = 0
            if len(list(self.folder.iterdir())):  # not the task that asks for the settings
                self.die("load")
        (self.folder / "described").touch()
        return super().describe()

    def write(self, path, content):
        self.die("before write")
        self.written(path, content)
        self.die("after write")

    def stream(self, photos):
        def counted():
            for photo in photos:
                self.die(f"read {self.photos}")
                self.photos += 1
                yield photo

        for batch in super().stream(counted()):
            self.die(f"computed {self.batches}")
            self.batches += 1
            yield batch


def test_an_actor_killed_at_ten_moments_loses_and_doubles_nothing(
    cluster, command, plain, tmp_path, monkeypatch
):
    deaths = tmp_path / "deaths"
    deaths.mkdir()

    def make(*args, **options):
        predictor = DyingPredictor(*args, **options)
        predictor.folder = deaths
        return predictor

    monkeypatch.setattr(infer, "Predictor", make)
    assert cli.main([*command, "--engine", "ray", "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in deaths.iterdir()} == {*map(str, range(10)), "described"}
    for stray in (tmp_path / "out").glob(".*"):  # of the death before the rename
        stray.unlink()
    assert_same(tmp_path / "out", plain)


class SlowPredictor(Predictor):
    """A predictor that leaves time to remove a node."""

    def stream(self, photos):
        time.sleep(1)
        return super().stream(photos)


def test_a_node_that_goes_away_is_survived(cluster, command, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "Predictor", SlowPredictor)
    out = tmp_path / "out"
    removed = []

    def remove():
        while len(list(out.glob("part-*.parquet"))) < 3:
            time.sleep(0.1)
        cluster.remove_node(cluster.second, allow_graceful=False)
        removed.append(len(list(out.glob("part-*.parquet"))))

    thread = threading.Thread(target=remove, daemon=True)
    thread.start()
    assert cli.main([*command, "--engine", "ray", "--out", str(out)]) == 0
    thread.join(60)
    assert removed and removed[0] < 8, "the node went away too late"
    for stray in out.glob(".*"):
        stray.unlink()
    assert_same(out, plain)
