"""Folders, shards and results by URL: in memory, and on an S3 server whose connections break."""

import re
import socket
import threading

import pytest
from helpers.extras import require
from helpers.inference import (
    contents,
    save_model,
    write_folder,
    write_parquet,
    write_shard,
)

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.utils.storage import RemotePath, StorageError

require("PIL", "safetensors")
fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model, photos (one broken), a shard and a Parquet file."""
    folder = tmp_path_factory.mktemp("inputs")
    named = list(contents(12, broken=(2,)).items())
    save_model(folder)
    write_folder(folder / "data" / "photos", dict(named[:6]))
    (folder / "data" / "photos" / "note.txt").write_text("no photo")
    write_shard(folder / "data" / "0.tar", dict(named[6:9]))
    write_parquet(folder / "data" / "0.parquet", dict(named[9:]))
    return folder


def infer(inputs, sources, out):
    options = ["--unit", "2", "--batch", "2", "--quiet", "--out", str(out)]
    return cli.main(["infer", str(inputs / "model"), *map(str, sources), *options])


def rows_of(out):
    """Return the rows of each part, without their source."""
    system, path = fsspec.core.url_to_fs(str(out))
    names = sorted(system.glob(f"{path}/part-*.parquet"))
    parts = []
    for name in names:
        with system.open(name) as file:
            table = parquet.read_table(file)
        parts.append(table.drop_columns("source").to_pylist())
    return parts


def upload(inputs, url):
    system, path = fsspec.core.url_to_fs(url)
    system.put(str(inputs / "data"), path, recursive=True)


def check_run(inputs, url, tmp_path, capsys):
    """The rows of photos, a shard and Parquet by URL are those of files, and a run resumes."""
    data = inputs / "data"
    assert infer(inputs, [data / "photos", data / "0.tar", data / "0.parquet"], tmp_path / "a") == 0
    upload(inputs, f"{url}/data")
    out = f"{url}/results"
    sources = [f"{url}/data/photos", f"{url}/data/*.tar", f"{url}/data/0.parquet"]
    capsys.readouterr()
    assert infer(inputs, sources, out) == 0
    printed = capsys.readouterr().out
    assert "(skipped 1 files: 1 .txt)" in printed and "5 units; 12 photos, 1 of them" in printed
    assert rows_of(out) == rows_of(tmp_path / "a")
    system, path = fsspec.core.url_to_fs(out)
    assert system.exists(f"{path}/_SUCCESS") and system.exists(f"{path}/_settings.json")
    system.rm(f"{path}/part-00001.parquet")
    assert infer(inputs, sources, out) == 0
    assert "1 units, 4 were there; 2 photos, 1 of them" in capsys.readouterr().out
    assert rows_of(out) == rows_of(tmp_path / "a")
    assert infer(inputs, sources[:1], out) == 1
    assert f"{out} holds the results of another run: units was 5" in capsys.readouterr().err


def test_a_run_by_url_in_memory_equals_one_of_files(inputs, tmp_path, capsys):
    check_run(inputs, "memory://bucket", tmp_path, capsys)


def test_urls_without_objects_or_drivers_are_named(inputs, tmp_path, capsys):
    for url, message in (
        ("memory://nowhere", "no photos and no shards in memory://nowhere"),
        ("memory://nowhere/0.tar", "memory://nowhere/0.tar cannot be read: "),
        ("nothing://bucket", "nothing://bucket cannot be listed: Protocol not known"),
    ):
        assert infer(inputs, [url], tmp_path / "out") == 1
        assert message in capsys.readouterr().err
    assert infer(inputs, [inputs / "data"], "nothing://bucket") == 1
    assert "nothing://bucket cannot be reached: Protocol" in capsys.readouterr().err


def test_a_part_that_cannot_be_written_and_an_object_that_is_gone_are_named(
    inputs, tmp_path, monkeypatch, capsys
):
    upload(inputs, "memory://gone/data")
    path = RemotePath("memory://gone/data/photos/none.jpg")
    with pytest.raises(StorageError, match=r"none\.jpg cannot be read"):
        cropr.Predictor(inputs / "model")([path])
    out = "memory://gone/results"
    plain = RemotePath.write_bytes

    def fail(path, content):
        if path.name == "part-00001.parquet":
            raise StorageError(f"{path} cannot be written: the peer is gone")
        return plain(path, content)

    monkeypatch.setattr(RemotePath, "write_bytes", fail)
    assert infer(inputs, [inputs / "data" / "photos"], out) == 1
    message = f"1 units failed, all others are done: {out}/part-00001.parquet cannot be written"
    assert message in capsys.readouterr().err
    monkeypatch.undo()
    assert infer(inputs, [inputs / "data" / "photos"], out) == 0


def test_what_is_written_in_part_is_absent(monkeypatch):
    path = RemotePath("memory://bucket/part")

    def fail(self, data):
        raise ConnectionResetError("the peer is gone")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.write", fail)
    with pytest.raises(StorageError, match="memory://bucket/part cannot be written: the peer is"):
        path.write_bytes(b"content")
    assert not path.exists()


class Proxy:
    """A TCP proxy that closes connections in the middle of the answers to some requests."""

    def __init__(self, port):
        self.port = port
        self.broken = re.compile(b"(?!)")  # of requests
        self.breaks = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.port))
            state = {"cut": False}
            for pump in (self.requests, self.answers):
                threading.Thread(target=pump, args=(client, server, state), daemon=True).start()

    def requests(self, client, server, state):
        try:
            while data := client.recv(1 << 16):
                state["cut"] = state["cut"] or bool(self.broken.search(data))
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def answers(self, client, server, state):
        try:
            while data := server.recv(1 << 16):
                if state["cut"]:
                    self.breaks += 1
                    client.sendall(data[: len(data) * 3 // 4])
                    break
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
            client.close()
        except OSError:
            pass


@pytest.fixture(scope="module")
def proxy():
    """A proxy to an S3 server with a bucket; fsspec uses it."""
    for library in ("moto", "s3fs", "boto3", "flask"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    between = Proxy(port)
    saved = fsspec.config.conf.copy()
    options = {"endpoint_url": between.url, "key": "test", "secret": "test"}
    options |= {"config_kwargs": {"retries": {"max_attempts": 1}, "read_timeout": 20}}
    fsspec.config.conf["s3"] = options
    fsspec.filesystem("s3").mkdir("bucket")
    yield between
    fsspec.config.conf.clear()
    fsspec.config.conf.update(saved)
    between.server.close()
    server.stop()


@pytest.mark.slow
def test_a_run_on_s3_equals_one_of_files(proxy, inputs, tmp_path, capsys):
    check_run(inputs, "s3://bucket/whole", tmp_path, capsys)


BROKEN = {
    "photo": rb"GET /bucket/broken/data/photos/0003.jpg",
    "shard": rb"GET /bucket/broken/data/0.tar",
    "Parquet": rb"GET /bucket/broken/data/0.parquet",
    "part": rb"(POST|PUT) /bucket/broken/out-part/part-00002.parquet",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_a_connection_that_breaks_names_the_object_and_the_same_command_finishes(
    case, proxy, inputs, tmp_path, capsys, monkeypatch
):
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)  # of five, each slower
    url = "s3://bucket/broken"
    upload(inputs, f"{url}/data")
    sources = [f"{url}/data/photos", f"{url}/data/0.tar", f"{url}/data/0.parquet"]
    out = f"{url}/out-{case}"
    monkeypatch.setattr(proxy, "broken", re.compile(BROKEN[case]))
    proxy.breaks = 0
    assert infer(inputs, sources, out) == 1
    message = capsys.readouterr().err
    name = "s3://" + BROKEN[case].rpartition(b" /")[2].decode()
    assert "1 units failed, all others are done: " in message and f"{name} cannot be" in message
    assert proxy.breaks and len(rows_of(out)) == 4
    assert not RemotePath(f"{out}/_SUCCESS").exists()
    monkeypatch.undo()
    assert infer(inputs, sources, out) == 0
    assert "1 units, 4 were there" in capsys.readouterr().out
    data = inputs / "data"
    assert infer(inputs, [data / "photos", data / "0.tar", data / "0.parquet"], tmp_path / "a") == 0
    assert rows_of(out) == rows_of(tmp_path / "a")
