"""Which page holds which sections."""

from benchmarks.report import comparison, features, measured, readme, restoring, saliency, schedules, training
from benchmarks.utils.results import DOCS, ROOT

PAGES = {
    ROOT / "README.md": readme.SECTIONS,
    DOCS / "benchmarks.md": measured.SECTIONS | restoring.SECTIONS,
    DOCS / "training-results.md": training.SECTIONS,
    DOCS / "comparison.md": comparison.SECTIONS | saliency.SECTIONS | schedules.SECTIONS,
    DOCS / "dense-features.md": features.SECTIONS,
}
