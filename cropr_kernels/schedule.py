"""Pruning schedules: how many tokens are kept after each block.

Modules are after every block but the last; with Last Layer Fusion after every block but the last
two, since tokens that the module before the last block dropped would return at once (paper section
3.2); one fewer for each further block that sees all tokens.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .utils.numbers import integer, integers, number

SCHEDULES = ("rate", "keep", "ratio", "const")  # alternatives


def num_modules(depth: int, llf: int) -> int:
    """Count the Cropr modules of a network of `depth` blocks, of which the last `llf` see all
    tokens by fusion.

    Raises ValueError if it is too shallow for one.
    """
    last = 1 + llf
    if depth <= last:
        raise ValueError(
            f"schedule: depth must be at least {last + 1} {_describe_llf(llf)}, got {depth}"
        )
    return depth - last


def _describe_llf(llf: int) -> str:
    return "without LLF" if not llf else "with LLF" if llf == 1 else f"with LLF over {llf} blocks"


@dataclass(frozen=True)
class Schedule:
    """The number of tokens kept after each block: exactly one of rate, keep, ratio and const.

    Args:
        rate: R >= 0, tokens dropped in every module, and P mod 4 more in the first, so that counts
            stay multiples of 4: ViT-L/16 at 224 px with rate 8: 197 -> 188, 180, ..., 20. 0 drops
            nothing.
        keep: the counts themselves, one per module, never rising; or a file that `cropr tune`
            wrote.
        ratio: the share, in (0, 1], of the patches each module receives that it keeps, rounded up.
        const: (after, count), to prune once: `count` tokens are kept after the first `after`
            blocks, and from then on.
        share: in [0, 1], of the pruned tokens that are pruned; of the rate, if there is one.

    Raises:
        ValueError: not exactly one is given, it is out of range or no number of its kind, or the
            file holds no schedule.
        FileNotFoundError: there is no such file.
    """

    rate: int | None = None
    keep: Sequence[int] | str | Path | None = None
    ratio: float | None = None
    const: Sequence[int] | None = None
    share: float = 1.0
    # The rate for torch.compile, which takes integers of a module for constants, and floats that
    # change for symbols.
    symbolic_rate: float | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [name for name in SCHEDULES if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError(
                "schedule: give exactly one of rate, keep, ratio and const, got "
                f"{', '.join(names) or 'none'}"
            )
        values: dict[str, object] = {
            "share": number("schedule: share", self.share, "in [0, 1]", lambda x: 0 <= x <= 1)
        }
        if self.rate is not None:
            values["rate"] = integer("schedule: rate", self.rate, 0)
        if self.ratio is not None:
            values["ratio"] = number(
                "schedule: ratio", self.ratio, "in (0, 1]", lambda x: 0 < x <= 1
            )
        if isinstance(self.keep, str | Path):
            values["keep"] = integers(
                f"schedule: keep in {self.keep}", _read_counts(Path(self.keep)), 1
            )
        elif self.keep is not None:
            values["keep"] = integers("schedule: keep", self.keep, 1)
        if self.const is not None:
            values["const"] = integers("schedule: const", self.const, 1)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "symbolic_rate", None if self.rate is None else float(self.rate))

    def counts(self, num_tokens: int, depth: int, num_prefix: int = 1, llf: int = 0) -> list[int]:
        """Kept tokens after each module, prefix included.

        Args:
            num_tokens: tokens that enter the network, prefix included.
            depth: blocks of the network.
            num_prefix: P, tokens that are never dropped (class token, registers).
            llf: number of last blocks that see all tokens by Last Layer Fusion; True is 1.

        Raises:
            ValueError: the network is too shallow, the schedule is for another number of modules,
                or a module would keep less than one patch or more tokens than there are.
        """
        modules = num_modules(depth, llf)
        if self.symbolic_rate is not None:
            # More often a multiple of 4 than a share of the counts
            rate = round(self.share * self.symbolic_rate)
            first = num_tokens - rate - (num_prefix % 4 if rate else 0)
            counts = [first - rate * module for module in range(modules)]
            if counts[-1] <= num_prefix:
                highest = max(num_tokens - num_prefix - 1 - num_prefix % 4, 0) // modules
                raise ValueError(
                    f"schedule: rate must be at most {highest} for {num_tokens} tokens and "
                    f"{modules} modules, so that "
                    f"one patch is left beside the {num_prefix} prefix tokens, got {rate}"
                )
            return self._checked(counts, num_tokens, num_prefix)
        if isinstance(self.keep, tuple):
            counts = list(self.keep)
            if len(counts) != modules:
                raise ValueError(
                    f"schedule: keep must list {modules} counts for {depth} blocks "
                    f"{_describe_llf(llf)}, got "
                    f"{len(counts)}"
                )
        elif self.ratio is not None:
            patches = num_tokens - num_prefix
            counts = []
            for _ in range(modules):
                patches = math.ceil(self.ratio * patches)
                counts.append(num_prefix + patches)
        else:
            const = self.const or ()
            if len(const) != 2 or not 1 <= const[0] <= modules:
                raise ValueError(
                    f"schedule: const must be (after, count), after in [1, {modules}] for {depth} "
                    "blocks "
                    f"{_describe_llf(llf)}, got {const}"
                )
            counts = [num_tokens] * (const[0] - 1) + [const[1]] * (modules - const[0] + 1)
        counts = self._checked(counts, num_tokens, num_prefix)
        return [num_tokens - math.floor(self.share * (num_tokens - count)) for count in counts]

    def _checked(self, counts: list[int], num_tokens: int, num_prefix: int) -> list[int]:
        for module, (before, count) in enumerate(zip([num_tokens, *counts], counts)):
            if not num_prefix + 1 <= count <= before:
                raise ValueError(
                    f"schedule: {self} keeps {count} of {before} tokens in module {module}; keep "
                    "at least one patch "
                    f"beside the {num_prefix} prefix tokens and at most the {before} there are"
                )
        return counts

    def __str__(self) -> str:
        [schedule] = [
            f"{name}={getattr(self, name)}" for name in SCHEDULES if getattr(self, name) is not None
        ]
        return schedule + ("" if self.share == 1.0 else f", {self.share:.0%} of it")


def _read_counts(path: Path) -> object:
    try:
        return json.loads(path.read_text())["keep"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"schedule: {path} holds no schedule: {error}") from error
