"""The combinations of parameters that the tests run: each value, and each pair of values."""

import itertools
import re
from pathlib import Path

from helpers.selection import covering


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


def test_make_interprets_every_file_with_tests_for_kernels(request):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    [words] = re.findall(r'grep -rlwE "(.*?)" tests', makefile)
    items = [item for item in request.session.items if item.get_closest_marker("kernels")]
    for path in {item.path for item in items}:
        assert re.search(rf"\b({words})\b", path.read_text()), path
