"""How the commands read their arguments."""

import argparse
import difflib
from typing import Any


class Parser(argparse.ArgumentParser):
    """Takes arguments in any order, and says which option an unknown one may be meant for."""

    hint = ""  # what an unknown argument may be about
    _nested = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """All arguments of the command: what is left over is an error here, where its options are known."""
        if self._nested:  # parse_known_intermixed_args calls this method, for options and for the others
            return super().parse_known_args(args, namespace)
        self._nested = True
        try:
            options, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._nested = False
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, known, 1, cutoff=0.75)
            hint = f"is {near[0]} meant?" if near else self.hint
            self.error(f"unknown argument {unknown[0]!r}{hint and '; '}{hint}")
        return options, []
