"""Cells of the classification benchmark: options of `cropr train` by group and method.

A method named in `registry.SYSTEMS`, `modules.MODULES` or `scorers.SCORERS` is trained with that
entry.
"""

from typing import Any

import cropr_kernels as cropr
from benchmarks.baselines.registry import BASELINES, SCHEDULES


def curve(power: float, total: int = 197, width: int = 192, modules: int = 11) -> list[int]:
    """Counts that fall by (blocks before)^power, at the FLOPs of R = 14."""

    def flops(counts: list[int]) -> int:
        return sum(count * (6 * width + count) for count in [total, *counts])

    def counts_of(scale: float) -> list[int]:
        return [
            max(2, round(total - scale * ((layer + 1) / modules) ** power))
            for layer in range(modules)
        ]

    goal = flops(cropr.Schedule(rate=14).counts(total, modules + 1))
    candidates = (counts_of(scale / 4) for scale in range(4 * total))
    return min(candidates, key=lambda counts: abs(flops(counts) - goal))


# 1.7 times fewer FLOPs than no pruning: fewer tokens after each block, or once; LLF: all tokens in
# the last block.
SCHEDULED = {name: options | {"llf": "LLF" in name} for name, options in SCHEDULES[12].items()}
DEC, DEC_LLF, CONST, CONST_LLF = (
    SCHEDULED[name] for name in ("dec", "dec, LLF", "const", "const, LLF")
)
# The same for other factors. With all tokens in four blocks, dropping once reaches at most 2.
FACTORS: dict[str, list[dict[str, Any]]] = {
    "1.5x": [
        dict(rate=11),
        dict(rate=14, llf=True),
        dict(const=(4, 103)),
        dict(const=(4, 88), llf=True),
    ],
    "2x": [
        dict(ratio=0.863),
        dict(ratio=0.826, llf=True),
        dict(const=(4, 51)),
        dict(const=(4, 27), llf=True),
    ],
    "3x": [dict(ratio=0.756), dict(ratio=0.656, llf=True)],
    "4x": [dict(ratio=0.65), dict(ratio=0.44, llf=True)],
}
STRONG = FACTORS["3x"][0]
CALIBRATED: dict[str, Any] = dict(calibrate=256)

MAIN: dict[str, dict[str, Any]] = {
    "no pruning": {},
    "Cropr": DEC | CALIBRATED,
    "Cropr, LLF": DEC_LLF | CALIBRATED,
    "Cropr, const": CONST | CALIBRATED,
    "Cropr, const, LLF": CONST_LLF | CALIBRATED,
    "variance": DEC,
    "random": DEC,
    "non-salient": DEC | CALIBRATED,
    "Cropr, random start": DEC,
    "Cropr, queries fixed": DEC | CALIBRATED | dict(fixed_queries=True),
}
TRAINED: dict[str, dict[str, Any]] = {}
for baseline in BASELINES:
    for schedule in baseline.trained:
        TRAINED[f"{baseline.name}, LLF" if "LLF" in schedule else baseline.name] = SCHEDULED[
            schedule
        ]
CELLS: dict[str, dict[str, dict[str, Any]]] = {
    "main": MAIN,
    "baselines": {
        "Cropr, merging": DEC | CALIBRATED | dict(merge=True),
        **{name: schedule for name, schedule in TRAINED.items() if name not in MAIN},
        "non-salient, LLF": DEC_LLF | CALIBRATED,
    },
    "schedules": {
        "no pruning": {},
        "Cropr": DEC | CALIBRATED,
        "Cropr, R falls": CALIBRATED | dict(keep=tuple(curve(0.7))),
        "Cropr, merging": DEC | CALIBRATED | dict(merge=True),
        "Cropr, merging, R rises": CALIBRATED | dict(keep=tuple(curve(1.3)), merge=True),
    },
    "last block": {
        "Cropr, LLF": DEC_LLF | CALIBRATED,
        "Cropr, LLF, host": DEC_LLF | CALIBRATED | dict(restore="track_parent"),
        "Cropr, merging, LLF, host": DEC_LLF
        | CALIBRATED
        | dict(restore="track_parent", merge=True),
        "Cropr, LLF, last block 10x as fast": DEC_LLF | CALIBRATED | dict(last_block_lr_scale=10.0),
        "no pruning, last block 10x as fast": dict(last_block_lr_scale=10.0),
    },
    "ablations": {
        "no MLP": STRONG | CALIBRATED,
        "no stop-gradient": STRONG | CALIBRATED,
        "sampling": STRONG | CALIBRATED,
        "queries fixed": STRONG | CALIBRATED | dict(fixed_queries=True),
        "random start": STRONG,
        "random start, several heads": STRONG,
    },
}
CROPR = ("Cropr", "Cropr, LLF", "Cropr, const", "Cropr, const, LLF")
for factor, schedules in FACTORS.items():
    dec = schedules[0]
    CELLS[factor] = {
        **{name: schedule | CALIBRATED for name, schedule in zip(CROPR, schedules)},
        "Cropr, merging": dec | CALIBRATED | dict(merge=True),
        **dict.fromkeys(("ToMe", "attention top-k", "variance", "random"), dec),
        "non-salient": dec | CALIBRATED,
    }
