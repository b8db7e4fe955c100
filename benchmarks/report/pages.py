"""Which page holds which sections."""

from benchmarks.report import comparison, readme, training
from benchmarks.utils.results import DOCS, ROOT

PAGES = {
    ROOT / "README.md": readme.SECTIONS,
    DOCS / "training.md": training.SECTIONS,
    DOCS / "comparison.md": comparison.SECTIONS,
}
