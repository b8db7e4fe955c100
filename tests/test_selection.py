"""The combinations of parameters that the tests run: each value, and each pair of values."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.selection import choose_combinations, covering


def test_each_choice_holds_every_value_in_as_few_combinations_as_the_longest_parameter_has_values():
    letters, numbers, flags = "abcdefg", range(4), (False, True)
    combinations = [
        dict(letter=letter, number=number, flag=flag)
        for letter, number, flag in itertools.product(letters, numbers, flags)
    ]
    chosen = [combinations[index] for index in covering(combinations)]
    assert len(chosen) == len(letters)
    for name, values in (("letter", letters), ("number", numbers), ("flag", flags)):
        assert {combination[name] for combination in chosen} == set(values)


def test_values_that_occur_with_few_others_are_chosen_too():
    combinations = [
        dict(op="add", dtype="half"),
        dict(op="add", dtype="float"),
        dict(op="rotate", dtype="float"),
    ]
    chosen = [combinations[index] for index in covering(combinations)]
    assert {combination["op"] for combination in chosen} == {"add", "rotate"}
    assert {combination["dtype"] for combination in chosen} == {"half", "float"}


def test_pairwise_holds_every_pair_of_values_in_less_than_the_product():
    parameters = dict(letter="abcdef", number=range(3), flag=(False, True))
    combinations = [
        dict(zip(parameters, values)) for values in itertools.product(*parameters.values())
    ]
    chosen = [combinations[index] for index in covering(combinations, strength=2)]
    assert len(chosen) <= 20 < len(combinations)
    for first, second in itertools.combinations(parameters, 2):
        pairs = {(combination[first], combination[second]) for combination in chosen}
        assert pairs == {*itertools.product(parameters[first], parameters[second])}


def test_a_combination_with_a_parameter_of_its_own_is_chosen_for_it():
    combinations = [dict(op="add"), dict(op="rotate", table="half"), dict(op="rotate", table="all")]
    assert covering(combinations, strength=2) == {0, 1, 2}


class Case:
    """A test with parameters, as pytest collects it."""

    def __init__(self, **parameters):
        self.nodeid = f"test_add[{parameters}]"
        self.callspec = SimpleNamespace(params=parameters)
        self.marks = set()

    def get_closest_marker(self, name):
        return name if name in self.marks else None

    def add_marker(self, name):
        self.marks.add(name)


@pytest.mark.parametrize(
    ("backend", "strength", "in_all"),
    [("reference", 1, 1), ("cpp", 2, 2), ("compiled", 1, 1), ("triton", 1, 1)],
)
def test_backends_run_each_value_or_each_pair(backend, strength, in_all):
    shapes, dtypes, flags = range(9), ("half", "float", "double"), (False, True)
    cases = [
        Case(backend=backend, shape=shape, dtype=dtype, flag=flag)
        for shape, dtype, flag in itertools.product(shapes, dtypes, flags)
    ]
    left_out = choose_combinations(cases)
    run = [case for case in cases if case not in left_out]
    quick = [case for case in run if "slow" not in case.marks]
    assert len(quick) < len(cases) / 1.5

    def values(chosen, strength):
        parts = [itertools.combinations(case.callspec.params.items(), strength) for case in chosen]
        return {*itertools.chain(*parts)}

    few = range(1, 9, 3) if backend in ("compiled", "triton") else shapes
    expected = [case for case in cases if case.callspec.params["shape"] in few]
    assert values(quick, strength) == values(expected, strength)
    assert values(run, in_all) == values(cases, in_all)
    if backend == "triton":
        first = [case for case in cases if case.callspec.params["shape"] == 0]
        assert values(run, 2) >= values(first, 2)


def test_make_interprets_every_file_with_tests_for_kernels(request):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    [words] = re.findall(r'grep -rlwE "(.*?)" tests', makefile)
    items = [item for item in request.session.items if item.get_closest_marker("kernels")]
    for path in {item.path for item in items}:
        assert re.search(rf"\b({words})\b", path.read_text()), path
