"""Tables of the pages: ranges, CSV, names of earlier results."""

import csv
import io

from benchmarks.report.render import Spread, Table, rename


def test_a_spread_is_a_mean_with_a_range_if_there_is_one():
    assert str(Spread([1.0, 2.0, 6.0], 1)) == "3.0 (1.0 to 6.0)"
    assert str(Spread([2.0, 2.0], 1)) == "2.0"
    assert str(Spread([-0.04, 0.03], 1)) == "0.0 (0.0 to 0.0)", "there is no minus zero"


def test_a_csv_file_holds_plain_numbers_and_three_columns_for_a_range():
    table = Table(
        ["method", "top-1, %", "speed"],
        [["**Cropr**", Spread([1.0, 2.0], 1), "1.50x"], ["a, b", "-", "0.3 %"]],
    )
    assert list(csv.reader(io.StringIO(table.csv()))) == [
        ["method", "top-1, %", "top-1, %, min", "top-1, %, max", "speed"],
        ["Cropr", "1.5", "1.0", "2.0", "1.50"],
        ["a, b", "", "", "", "0.3"],
    ]
    assert table.select(["speed", "method"]).rows == [["1.50x", "**Cropr**"], ["0.3 %", "a, b"]]
    assert table.means().markdown().splitlines()[2] == "| **Cropr** | 1.5 | 1.50x |"


def test_earlier_results_are_shown_under_current_names():
    assert rename('dropping, "left"') == "dropping, as_pruned" and rename("left") == "as_pruned"
    assert rename("Cropr, merging, LLF, host") == "Cropr, merging, LLF, track_parent"
    assert (
        rename("4 hosts' change, behind the last block")
        == "4 parents' change, after the last block"
    )
    assert rename("as_pruned") == "as_pruned" and rename("one last block") == "one last block"
    assert rename("merge, no choice of the redundant") == "merge, no choice by redundancy"
