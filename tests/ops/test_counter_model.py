"""A model checker for select.is_last: in every interleaving the last program of an image sees all
of its scores.

A model of weak memory: a store waits in a buffer until it reaches memory, at any time, at a release
at the latest; what a program has seen early may be out of date until it acquires. A program has two
warps, each stores a score, one counts.
"""

import itertools

import pytest

IMAGES = {0: "a", 1: "a", 2: "b"}  # of programs
SCORES = [(program, warp) for program in IMAGES for warp in range(2)]


def steps(state, barrier, release, acquire):
    """Yield the states that may follow.

    A state: scores in buffers, scores in memory, (program, score) missed early, programs counted,
    programs that know that they are last.
    """
    buffered, memory, missed, counted, last = state
    for score in SCORES:
        if score in buffered:
            yield buffered - {score}, memory | {score}, missed, counted, last
        elif score not in memory:
            yield buffered | {score}, memory, missed, counted, last
    for program in IMAGES.keys() - counted:
        image = {other for other in IMAGES if IMAGES[other] == IMAGES[program]}
        for score in SCORES:
            if score[0] in image - {program} and score not in memory:
                yield buffered, memory, missed | {(program, score)}, counted, last
        ordered = {(program, warp) for warp in (range(2) if barrier else [0])}  # before the count
        if ordered <= buffered | memory:
            pushed = buffered & ordered if release else frozenset()
            kept = (
                frozenset(entry for entry in missed if entry[0] != program) if acquire else missed
            )
            is_last = image <= counted | {program}
            yield (
                buffered - pushed,
                memory | pushed,
                kept,
                counted | {program},
                last | {program} if is_last else last,
            )


def unseen(*, barrier=True, release=True, acquire=True):
    """Return the number of states, and the scores that a program may miss although it knows that it
    is last."""
    start = (frozenset(),) * 5
    todo, known, unseen_scores = [start], {start}, set()
    while todo:
        state = todo.pop()
        buffered, memory, missed, _, last = state
        for program, score in itertools.product(last, SCORES):
            arrived = score in memory or (score in buffered and score[0] == program)
            if IMAGES[score[0]] == IMAGES[program] and (not arrived or (program, score) in missed):
                unseen_scores.add((program, score))
        new = set(steps(state, barrier, release, acquire)) - known
        known |= new
        todo += new
    return len(known), unseen_scores


def test_the_last_program_sees_every_score():
    states, unseen_scores = unseen()
    assert states > 1000
    assert not unseen_scores


@pytest.mark.parametrize("without", ["barrier", "release", "acquire"])
def test_without_any_part_of_the_protocol_scores_are_missed(without):
    assert unseen(**{without: False})[1]
