"""Ray Data as the engine of `cropr infer`: a pool of actors takes units and writes their parts.

A unit is a task. Ray runs it again, elsewhere, if its actor or its node is lost; the part is the
same and replaces that of the first try, so that nothing is lost or doubled.
"""

import contextlib
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from ..utils.optional import import_optional
from .parts import Outcome, Run, changes, write_part
from .predictor import Predictor


class PartWriter:
    """The work of an actor: units to parts, by a predictor that is loaded once."""

    def __init__(self, predictor: Predictor, settings: dict[str, Any], folder: str):
        """Load the model; raises ValueError if it is not that of the run on this node.

        folder: the working directory of the command, which relative paths mean.
        """
        enter(folder)
        changed = changes(settings, predictor.describe())
        if changed:
            raise ValueError(f"the model must be the same on every node: {changed}")
        self.predictor = predictor

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the part of the unit in a batch of one row; return its outcome."""
        unit, part = pickle.loads(batch["task"][0])
        outcome = write_part(self.predictor, unit, part)
        return {name: [value] for name, value in outcome._asdict().items()}


class Cluster:
    """The Ray cluster that RAY_ADDRESS names, or one of this machine; a context that leaves it.

    Args:
        actors: at most; default one for each GPU, or without GPUs for each CPU.
        show: show Ray's progress bars.
    """

    def __init__(self, actors: int | None, *, show: bool):
        self.actors = actors
        self.show = show
        self.ray = import_optional("ray", "ray", "cropr infer --engine ray")
        self.data = import_optional("ray.data", "ray", "cropr infer --engine ray")

    def __enter__(self) -> "Cluster":
        self.joins = not self.ray.is_initialized()
        if self.joins:
            with self._errors():
                self.ray.init(log_to_driver=False)
        resources = self.ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.resources = {"num_cpus": 1, "num_gpus": int(gpus > 0)}
        self.size = self.actors or gpus or int(resources["CPU"])
        context = self.data.DataContext.get_current()
        context.enable_progress_bars = self.show
        return self

    def __exit__(self, *_: object) -> None:
        if self.joins:
            self.ray.shutdown()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise errors of Ray as RuntimeError, with the error of the actor."""
        try:
            yield
        except (self.ray.exceptions.RayError, ConnectionError) as error:
            cause = getattr(error, "cause", None) or error
            raise RuntimeError(f"Ray: {cause}") from error

    def describe(self, predictor: Predictor) -> tuple[str, dict[str, Any]]:
        """Return the summary and the settings of the model, from a node that runs it."""
        describe = self.ray.remote(**self.resources)(_describe)
        with self._errors():
            return self.ray.get(describe.remote(predictor, os.getcwd()))

    def write_parts(
        self, predictor: Predictor, settings: dict[str, Any], run: Run, indices: Sequence[int]
    ) -> Iterator[Outcome]:
        """Write the parts of these units, and yield the outcome of each as it ends."""
        tasks = [{"task": pickle.dumps((run.units[i], run.part(i)))} for i in indices]
        units = self.data.from_items(tasks, override_num_blocks=len(tasks))
        outcomes = units.map_batches(
            PartWriter,
            fn_constructor_args=(predictor, settings, os.getcwd()),
            batch_size=1,
            compute=self.data.ActorPoolStrategy(
                size=min(self.size, len(tasks)), max_tasks_in_flight_per_actor=1
            ),
            **self.resources,
        )
        with self._errors():
            for row in outcomes.iter_rows():
                yield Outcome(**row)


def enter(folder: str) -> None:
    """Change into a folder if this node has it; URLs and absolute paths do not need it."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


def _describe(predictor: Predictor, folder: str) -> tuple[str, dict[str, Any]]:
    enter(folder)
    return predictor.summary, predictor.describe()
