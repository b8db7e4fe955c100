"""Every baseline by name: its factory, the benchmarks that run it, and its published figures.

The table, the trainings, the off-the-shelf comparison and the pages need one entry here of a new
baseline.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from benchmarks.baselines.learned import DynamicViT, PatchMerger, Sinkhorn, SiT
from benchmarks.baselines.matching import ATM, PiToMe
from benchmarks.baselines.merging import ATC, DPCKNN, ToMe
from benchmarks.baselines.network import Make
from benchmarks.baselines.selection import (
    ATS,
    POMT,
    SAINT,
    AttentionTopK,
    EViT,
    FeatureVariance,
    KMedoids,
    PixelVariance,
    Random,
    RepresentationShift,
)

Schedule = Literal["dec, LLF", "dec", "const", "const, LLF"]  # in the order of the table
# By depth. The paper's rate at 24 blocks; at 12 the rates at which the accuracy benchmarks train.
SCHEDULES: dict[int, dict[Schedule, dict[str, Any]]] = {
    12: {
        "dec": {"rate": 14},
        "dec, LLF": {"rate": 17},
        "const": {"const": (4, 79)},
        "const, LLF": {"const": (4, 60)},
    },
    24: {
        "dec": {"rate": 8},
        "dec, LLF": {"rate": 8},
        "const": {"const": (8, 79)},
        "const, LLF": {"const": (8, 79)},
    },
}
# published: accuracy, thousands of images a second (ViT-L, ImageNet-1k)
Figures = tuple[float, float]


@dataclass(frozen=True)
class Baseline:
    """An entry of the registry."""

    name: str
    make: Make
    # "pruning" and "merging" need no training; "learned" has its own parameters; "once" reduces at
    # a single block, mostly with its own parameters
    category: Literal["pruning", "merging", "learned", "once"]
    keeps: str  # description of the kept tokens, for the page
    # Schedules to time, with published figures
    timed: dict[Schedule, Figures | None] = field(default_factory=dict)
    trained: tuple[Schedule, ...] = ()  # schedules to train besides Cropr
    trained_as: str | None = None  # the baseline trained instead
    # Clusters on the CPU: too slow to time on a GPU at the batches that fill one
    on_host: bool = False
    variant: bool = False  # of the baseline before it: neither plotted nor listed by itself


BASELINES = (
    Baseline(
        "random",
        lambda dim, kept, patches: Random(),
        "pruning",
        "any tokens",
        timed={"dec, LLF": (83.8, 1.50), "dec": None},
        trained=("dec", "dec, LLF"),
    ),
    Baseline(
        "variance",
        lambda dim, kept, patches: FeatureVariance(),
        "pruning",
        "the highest variance over channels",
        timed={"dec, LLF": (84.3, 1.50), "dec": None},
        trained=("dec", "dec, LLF"),
    ),
    Baseline(
        "pixel variance",
        lambda dim, kept, patches: PixelVariance(),
        "pruning",
        "the highest variance of the patch's pixels, for the whole network",
        timed={"dec, LLF": None, "dec": None},
        trained=("dec",),
    ),
    Baseline(
        "attention top-k",
        lambda dim, kept, patches: AttentionTopK(),
        "pruning",
        "those the class token attends to most",
        timed={"dec, LLF": (84.7, 1.45), "dec": None},
        trained=("dec", "dec, LLF"),
    ),
    Baseline(
        "EViT",
        lambda dim, kept, patches: EViT(),
        "pruning",
        "the same, and one token: the attention-weighted sum of the others",
        timed={"dec": (84.5, 1.57)},
        trained=("dec",),
    ),
    Baseline(
        "ATS",
        lambda dim, kept, patches: ATS(),
        "pruning",
        "samples of the cumulated significance (attention of the class token x norm of the "
        "value); a different number "
        "in each image, at most the schedule's",
        timed={"dec": (83.9, 0.49)},
        trained_as="ATS, trimmed",
    ),
    Baseline(
        "ATS, trimmed",
        lambda dim, kept, patches: ATS(trim=True),
        "pruning",
        "",
        timed={"dec": None},
        trained=("dec",),
        variant=True,
    ),
    Baseline(
        "k-medoids",
        lambda dim, kept, patches: KMedoids(),
        "pruning",
        "the middle of each cluster, weighted by the attention it receives",
        timed={"dec": (84.5, 0.31)},
        trained=("dec",),
    ),
    Baseline(
        "representation shift",
        lambda dim, kept, patches: RepresentationShift(),
        "pruning",
        "those to which the MLP adds most",
        timed={"dec": None},
        trained=("dec",),
    ),
    Baseline(
        "SAINT",
        lambda dim, kept, patches: SAINT(),
        "pruning",
        "odd patches, and even ones that are like few odd ones",
        timed={"dec": None},
        trained=("dec",),
    ),
    Baseline(
        "DPC-KNN",
        lambda dim, kept, patches: DPCKNN(),
        "merging",
        "means of clusters around density peaks of all distances",
        timed={"dec": (79.2, 1.00)},
        trained_as="DPC-KNN, learned weights",
    ),
    Baseline(
        "DPC-KNN, learned weights",
        lambda dim, kept, patches: DPCKNN(dim),
        "learned",
        "",
        trained=("dec",),
        variant=True,
    ),
    Baseline(
        "ToMe",
        lambda dim, kept, patches: ToMe(),
        "merging",
        "even tokens merge into their most similar odd ones, in pairs",
        timed={"dec": (85.0, 1.55)},
        trained=("dec",),
    ),
    Baseline(
        "ToMe, plain attention",
        lambda dim, kept, patches: ToMe(proportional=False),
        "merging",
        "",
        timed={"dec": None},
        trained=("dec",),
        variant=True,
    ),
    Baseline(
        "PiToMe",
        lambda dim, kept, patches: PiToMe(),
        "merging",
        "those that are like many others merge in pairs",
        timed={"dec": None},
        trained=("dec",),
    ),
    Baseline(
        "PiToMe, plain attention",
        lambda dim, kept, patches: PiToMe(proportional=False),
        "merging",
        "",
        variant=True,
    ),
    Baseline(
        "ATM",
        lambda dim, kept, patches: ATM(),
        "merging",
        "the most similar, smaller ones first, merge in pairs; late in the network small ones "
        "into large ones",
        timed={"dec": None},
        trained=("dec",),
    ),
    Baseline(
        "ATM, even and odd",
        lambda dim, kept, patches: ATM(distinctive=False),
        "merging",
        "",
        variant=True,
    ),
    Baseline(
        "ATC",
        lambda dim, kept, patches: ATC(),
        "merging",
        "means of agglomerative clusters",
        timed={"dec": None},
        trained=("dec",),
        on_host=True,
    ),
    Baseline(
        "ATC, complete linkage",
        lambda dim, kept, patches: ATC("complete"),
        "merging",
        "",
        variant=True,
    ),
    Baseline(
        "ATC, single linkage",
        lambda dim, kept, patches: ATC("single"),
        "merging",
        "",
        variant=True,
    ),
    Baseline(
        "POMT",
        lambda dim, kept, patches: POMT(),
        "once",
        "those patches attend to most and of the largest values, and the mean of the others",
    ),
    Baseline(
        "DynamicViT",
        DynamicViT,
        "once",
        "those a learned predictor chooses",
        timed={"const": (64.4, 1.32)},
        trained=("const",),
    ),
    Baseline(
        "SiT",
        SiT,
        "once",
        "means, weighted by a small MLP of each token",
        timed={"const": (83.0, 1.41)},
        trained=("const",),
    ),
    Baseline(
        "Sinkhorn",
        lambda dim, kept, patches: Sinkhorn(dim, kept),
        "once",
        "means, carried to learned centres by optimal transport",
        timed={"const": (56.5, 1.40)},
        trained=("const",),
    ),
    Baseline(
        "PatchMerger",
        lambda dim, kept, patches: PatchMerger(dim, kept),
        "once",
        "means, weighted by learned queries",
        timed={"const": (82.4, 1.40)},
        trained=("const",),
    ),
)
SYSTEMS: dict[str, Make] = {baseline.name: baseline.make for baseline in BASELINES}
ON_HOST = tuple(baseline.name for baseline in BASELINES if baseline.on_host)
REDUCE_ONCE = tuple(baseline.name for baseline in BASELINES if baseline.category == "once")
_TRAINED = {baseline.trained_as for baseline in BASELINES}
_UNTRAINED = [baseline for baseline in BASELINES if baseline.category in ("pruning", "merging")]
OFF_THE_SHELF = tuple(baseline.name for baseline in _UNTRAINED if baseline.name not in _TRAINED)


class Row(NamedTuple):
    """A line of the paper's table of classification (ViT-L, ImageNet-1k)."""

    system: str
    schedule: Schedule
    published: Figures | None = None


UNPRUNED: Figures = (85.8, 0.86)
CROPR_ROWS = (
    Row("non-salient", "dec, LLF", (76.4, 1.48)),
    Row("Cropr", "dec, LLF", (85.3, 1.48)),
    Row("Cropr, merging", "dec"),
    Row("Cropr", "dec", (85.1, 1.61)),
    Row("Cropr", "const", (85.4, 1.43)),
    Row("Cropr", "const, LLF", (85.5, 1.35)),
)


def rows_of(schedule: Schedule) -> list[Row]:
    """The baselines of a schedule, then Cropr."""
    timed = [baseline for baseline in BASELINES if schedule in baseline.timed]
    rows = [Row(baseline.name, schedule, baseline.timed[schedule]) for baseline in timed]
    return rows + [row for row in CROPR_ROWS if row.schedule == schedule]


ROWS = tuple(itertools.chain.from_iterable(map(rows_of, get_args(Schedule))))


class Fusion(NamedTuple):
    """A way to a full map: its name, and the published mIoU and GFLOPs (ADE20k, EVA-02-L)."""

    name: str
    miou: float
    gflops: float


FUSIONS = {
    "unpruned": Fusion("no pruning", 56.7, 311),
    "cross_attn": Fusion("cross-attention", 49.3, 184),
    "concat": Fusion("token concatenation", 51.8, 172),
    "cross_attn_concat": Fusion("cross-attention + concatenation", 51.1, 186),
    "mhsa_concat": Fusion("MHSA + concatenation", 55.2, 186),
    "dtop": Fusion("DToP", 50.1, 174),
    "llf": Fusion("LLF", 56.6, 183),
}
