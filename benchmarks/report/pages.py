"""Which page holds which sections."""

from benchmarks.report import comparison, features, measured, readme, training
from benchmarks.utils.results import DOCS, ROOT

PAGES = {
    ROOT / "README.md": readme.SECTIONS,
    DOCS / "benchmarks.md": measured.SECTIONS,
    DOCS / "training-results.md": training.SECTIONS,
    DOCS / "comparison.md": comparison.SECTIONS,
    DOCS / "dense-features.md": features.SECTIONS,
}
