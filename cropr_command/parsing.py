"""The argument parser of the commands."""

import argparse
import difflib
from collections.abc import Sequence


class Parser(argparse.ArgumentParser):
    """A parser that takes arguments in any order, and suggests an option for an unknown one."""

    hint = ""  # shown for unknown arguments
    _nested = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse all arguments of the command; unknown ones are an error here, where its options are
        known."""
        if self._nested:  # called by parse_known_intermixed_args, for options and for positionals
            return super().parse_known_args(args, namespace)
        self._nested = True
        try:
            options, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._nested = False
        if unknown:
            names: list[str] = []
            for action in self._actions:
                names += action.option_strings
            matches = difflib.get_close_matches(unknown[0].partition("=")[0], names, 1, cutoff=0.75)
            hint = f"is {matches[0]} meant?" if matches else self.hint
            self.error(f"unknown argument {unknown[0]!r}{hint and '; '}{hint}")
        return options, []
