"""`cropr infer`: run a pruned model over photos, and write Parquet.

Work is split into units, a shard or a few thousand photos of a folder; each unit makes one file,
complete or absent. Processes share the units without communication, or the actors of Ray take them;
an interrupted run resumes with the units that have no file, on any engine.
"""

import argparse
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from ..inference.parts import Outcome, Run, write_part
from ..inference.predictor import OPTIONS, Predictor
from ..inference.ray_engine import Cluster
from ..inference.units import find_units
from ..utils.images import describe_skipped
from ..utils.io import require_launcher
from ..utils.optional import import_optional
from ..utils.progress import Progress
from ..utils.storage import RemotePath, location
from .outputs import check_folder


def run(options: argparse.Namespace) -> None:
    for library in ("pyarrow", "pyarrow.parquet", "PIL.Image"):
        import_optional(library, "infer", "cropr infer")
    out = location(options.out)
    if isinstance(out, RemotePath):
        out.exists()  # raises if its server, or its driver, is missing
    else:
        check_folder(out)
    skipped: Counter[str] = Counter()
    units = find_units([location(source) for source in options.source], options.unit, skipped)
    predictor = Predictor(
        options.model,
        queries=options.queries,
        rate=options.rate,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch,
        features=options.features,
        top=options.top,
        threads=options.workers,
        **{name: vars(options)[name] for name in OPTIONS},
    )
    job = Run(units, out)
    if options.engine == "ray":
        with Cluster(options.actors, show=not options.quiet) as cluster:
            summary, settings = cluster.describe(predictor)
            print(f"{summary}{describe_skipped(skipped)}")
            job.claim(settings)
            pending = job.missing(range(len(units)))
            outcomes = [*cluster.write_parts(predictor, settings, job, pending)] if pending else []
        _report(job, range(len(units)), outcomes)
        return
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    settings = predictor.describe()
    if rank == 0:
        print(f"{predictor.summary}{describe_skipped(skipped)}")
    job.claim(settings)
    assigned = range(len(units))[rank::world]
    pending = job.missing(assigned)
    show = not options.quiet and rank == 0
    outcomes = [*_write_parts(predictor, job, pending, show)]
    _report(job, assigned, outcomes, f"process {rank} of {world}: " if world > 1 else "")


def _write_parts(
    predictor: Predictor, job: Run, pending: Sequence[int], show: bool
) -> Iterator[Outcome]:
    """Write the parts of these units in this process, with progress."""
    parent = os.getppid()
    counts = [len(job.units[index].photos) for index in pending]
    with Progress("photos", sum(counts) if all(counts) else None, show=show) as progress:
        for index in pending:
            require_launcher(parent, "infer")
            yield write_part(predictor, job.units[index], job.part(index), progress.update)


def _report(
    job: Run, assigned: Sequence[int], outcomes: Sequence[Outcome], prefix: str = ""
) -> None:
    """Print the totals; raises RuntimeError for units that failed."""
    failures = [outcome.failure for outcome in outcomes if outcome.failure]
    resumed = len(assigned) - len(outcomes)
    print(
        f"{prefix}{len(outcomes) - len(failures)} units"
        f"{f', {resumed} were there' if resumed else ''}; "
        f"{sum(outcome.photos for outcome in outcomes)} photos, "
        f"{sum(outcome.unreadable for outcome in outcomes)} of them unreadable"
    )
    gflops = sorted(value for outcome in outcomes for value in outcome.gflops)
    if gflops:
        print(
            f"{prefix}GFLOPs (multiply-adds) of a photo: mean {statistics.fmean(gflops):.3g}, 95th "
            f"percentile {gflops[math.ceil(0.95 * len(gflops)) - 1]:.3g}"
        )
    if failures:
        raise RuntimeError(
            f"{prefix}{len(failures)} units failed, all others are done: {'; '.join(failures)}"
        )
    if job.finish():
        print(f"{prefix}all {len(job.units)} units are there: {job.out}")
