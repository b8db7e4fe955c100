"""Sections of the pages and CSV files: which module of the report writes which."""

from benchmarks.report import (
    adaptive,
    comparison,
    engines,
    exported,
    features,
    image_lists,
    measured,
    off_the_shelf,
    readme,
    restoring,
    saliency,
    schedules,
    supported,
    training,
    view,
    vlm,
    windows,
)
from benchmarks.report.render import Files
from benchmarks.utils.results import DOCS, RESULTS, ROOT

PAGES = {
    ROOT / "README.md": readme.SECTIONS,
    DOCS / "benchmarks.md": measured.SECTIONS | restoring.SECTIONS,
    DOCS / "training-results.md": training.SECTIONS,
    DOCS / "comparison.md": comparison.SECTIONS
    | off_the_shelf.SECTIONS
    | adaptive.SECTIONS
    | saliency.SECTIONS
    | schedules.SECTIONS,
    DOCS / "deployment.md": exported.SECTIONS,
    DOCS / "dense-features.md": features.SECTIONS,
    DOCS / "rates.md": image_lists.SECTIONS,
    DOCS / "supported-models.md": supported.SECTIONS | windows.SECTIONS,
    DOCS / "view.md": view.SECTIONS,
    DOCS / "scale.md": engines.SECTIONS,
    DOCS / "vlm.md": vlm.SECTIONS,
}
MODULES = (
    adaptive,
    comparison,
    off_the_shelf,
    saliency,
    schedules,
    measured,
    restoring,
    training,
    features,
    supported,
    windows,
    vlm,
    exported,
)
FILES: Files = {name: table for module in MODULES for name, table in module.FILES.items()}


def csv_files() -> dict[str, str]:
    """Text of every CSV file of benchmarks/results, by name."""
    tables = {name: table() for name, table in FILES.items()}
    return {f"{name}.csv": table.csv() for name, table in tables.items() if table is not None}


def stored_csv_files() -> dict[str, str]:
    """The CSV files as they are, but for that of benchmarks/kernels/roofline.py."""
    return {
        path.name: path.read_text() for path in RESULTS.glob("*.csv") if path.stem != "roofline"
    }
