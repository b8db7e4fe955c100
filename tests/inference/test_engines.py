"""The predictor in other engines, ten lines each: the rows of `cropr infer`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.inference import contents, save_model, table_of, write_folder

from cropr_kernels.cli import __main__ as cli

ENGINES = Path(__file__).parents[2] / "examples" / "engines"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, a folder of photos of which one is broken, and the rows of `cropr infer`."""
    folder = tmp_path_factory.mktemp("inputs")
    model = save_model(folder)
    photos = write_folder(folder / "photos", contents(12, broken=(5,)))
    assert cli.main(["infer", model, str(photos), "--quiet", "--out", str(folder / "out")]) == 0
    return model, photos, {row["name"]: row for row in table_of(folder / "out").to_pylist()}


def run(engine, inputs, out, *launcher):
    model, photos, _ = inputs
    command = [sys.executable, *launcher, str(ENGINES / engine), model, str(photos), str(out)]
    environment = {
        **os.environ,
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_SUBMIT_ARGS": "--master local[1] pyspark-shell",
        "SPARK_LOCAL_IP": "127.0.0.1",
        "HF_DATASETS_CACHE": f"{out}-cache",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_rows(rows, inputs):
    """Rows of an engine, by the path of the photo, are those of `cropr infer`."""
    expected = inputs[2]
    rows = {Path(path).name: row for path, row in rows.items()}
    assert rows.keys() == expected.keys() and len(rows) == 12
    for name, row in rows.items():
        assert row["error"] == expected[name]["error"]
        if row["error"] is None:
            assert list(row["classes"]) == expected[name]["classes"]
            assert list(row["probabilities"]) == pytest.approx(expected[name]["probabilities"])
        else:
            assert set(row["classes"]) == {-1}


def test_datasets_map_of_hugging_face(inputs, tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    run("hugging_face.py", inputs, tmp_path / "results.parquet")
    rows = table_of(tmp_path / "results.parquet").to_pylist()
    assert_rows({row["name"]: row for row in rows}, inputs)


def test_a_pandas_udf_of_spark(inputs, tmp_path):
    pytest.importorskip("pyspark", reason="pyspark is not installed")
    pytest.importorskip("pandas", reason="pandas is not installed")
    run("spark.py", inputs, tmp_path / "results")
    rows = table_of(tmp_path / "results").to_pylist()
    assert_rows({row["path"]: row for row in rows}, inputs)


def test_two_processes_of_torchrun(inputs, tmp_path):
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run("torchrun.py", inputs, tmp_path / "results", *launcher)
    rows = {}
    for rank in range(2):
        with np.load(tmp_path / "results" / f"{rank}.npz", allow_pickle=True) as results:
            columns = {name: results[name] for name in results.files}
        assert len(columns["name"]) == 6
        for index, name in enumerate(columns.pop("name")):
            rows[name] = {column: values[index] for column, values in columns.items()}
    assert_rows(rows, inputs)
