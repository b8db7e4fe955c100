"""The choice of what `make test` runs: each value of every parameter, in few combinations."""

import itertools

from helpers.selection import each_choice


def test_each_choice_holds_every_value_in_as_few_combinations_as_the_longest_parameter_has_values():
    letters, numbers, flags = "abcdefg", range(4), (False, True)
    combinations = [
        dict(letter=letter, number=number, flag=flag)
        for letter, number, flag in itertools.product(letters, numbers, flags)
    ]
    chosen = [combinations[index] for index in each_choice(combinations)]
    assert len(chosen) == len(letters)
    for name, values in (("letter", letters), ("number", numbers), ("flag", flags)):
        assert {combination[name] for combination in chosen} == set(values)


def test_values_that_occur_with_few_others_are_chosen_too():
    combinations = [
        dict(op="add", dtype="half"),
        dict(op="add", dtype="float"),
        dict(op="rotate", dtype="float"),
    ]
    chosen = [combinations[index] for index in each_choice(combinations)]
    assert {combination["op"] for combination in chosen} == {"add", "rotate"}
    assert {combination["dtype"] for combination in chosen} == {"half", "float"}
