"""The glossary check: what it reports, at which line, and what it passes."""

from pathlib import Path

import pytest

from tools import glossary

PYTHON = '''
def offsets(x, host):  # 2
    """The own host_offsets of x are found."""
    own = ops.host_offsets(x, safe_idx=x)  # 4
    return [one for one in own]  # 5

class Slot:  # 7
    def __init__(self):
        self.whole = 1  # 9
'''
CPP = """
// the own host is found
fail("host_idx must be int64, as the host");  /* its own
host */ auto found = table.find(key);  // 4
const Tensor& host_idx = state.host_idx;  // 5
"""
MARKDOWN = """
The host of a token, found by `ops.host_offsets`.
```python
idx = merged.idx
own, host_idx = offsets(x)
```
"""


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.py", PYTHON, "2:host 4:host_offsets 4:own 4:safe_idx 5:one 7:Slot 9:whole"),
        ("a.cpp", CPP, "4:found 5:host_idx"),
        ("a.h", CPP, "4:found 5:host_idx"),
        ("a.md", "`add_hosts`\n" + MARKDOWN, "1:add_hosts 6:host_idx"),
    ],
)
def test_a_replaced_word_is_reported_at_its_line(name, text, words, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(text)
    reported = [
        line.removeprefix(f"{path}:").split(": use ")[0].replace(": ", ":")
        for line in glossary.problems(path)
    ]
    assert reported == words.split()
    assert (
        glossary.main([str(tmp_path)]) == 1
        and f"{len(reported)} problems" in capsys.readouterr().out
    )


def test_the_report_names_the_replacement(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("host_idx = 0\n")
    assert glossary.problems(path) == [f"{path}:1: host_idx: use parent_idx"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.py",
            "y = sort(x, kind=1) + x.whole + plan(how)\non_host = in_place = parent_offsets = "
            "url.hostname\nones = 1\n",
        ),
        ("a.py", "layout = {'host': 'own'}  # the host, found\n"),
        (
            "a.cpp",
            "enum class Kind { kNumber } kind;\nfill(costs, 0);\nstream << std::left << "
            "options.host << row->own;\n",
        ),
        ("a.md", "A host is found; `--plan FILE` and `kind` say how.\n"),
        ("a.json", "host_idx"),
    ],
)
def test_a_legitimate_use_passes(name, text, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert glossary.main([str(tmp_path / name)]) == 0
    assert capsys.readouterr().out == "glossary: 0 problems\n"


def test_no_word_is_replaced_twice_or_by_a_word_that_is_replaced_itself():
    words = " ".join([*glossary.RENAMED.values(), *glossary.VAGUE.values()]).split()
    assert len(words) == len(set(words))
    assert not set(words) & set(glossary.RENAMED)


def test_the_check_passes_its_own_folder():
    assert glossary.main([str(Path(glossary.__file__).parent)]) == 0
