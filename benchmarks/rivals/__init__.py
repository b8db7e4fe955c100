"""The systems that Cropr is compared with, on the reference ViT and at the token counts of a schedule.

Written to be fast in PyTorch, with this package's ops where they fit. `SYSTEMS` makes each by name.
"""

from .learned import DynamicViT, PatchMerger, ReducedClassifier, Sinkhorn, SiT
from .merging import DPCKNN, ToMe
from .network import Make, Reduced
from .selection import ATS, AttentionTopK, EViT, FeatureVariance, KMedoids, PixelVariance, Random

SYSTEMS: dict[str, Make] = {
    "random": lambda dim, kept, patches: Random(),
    "variance": lambda dim, kept, patches: FeatureVariance(),
    "pixel variance": lambda dim, kept, patches: PixelVariance(),
    "attention top-k": lambda dim, kept, patches: AttentionTopK(),
    "EViT": lambda dim, kept, patches: EViT(),
    "ATS": lambda dim, kept, patches: ATS(),
    "ATS, trimmed": lambda dim, kept, patches: ATS(trim=True),
    "k-medoids": lambda dim, kept, patches: KMedoids(),
    "DPC-KNN": lambda dim, kept, patches: DPCKNN(),
    "DPC-KNN, learned weights": lambda dim, kept, patches: DPCKNN(dim),
    "ToMe": lambda dim, kept, patches: ToMe(),
    "ToMe, plain attention": lambda dim, kept, patches: ToMe(proportional=False),
    "ToMe, fused": lambda dim, kept, patches: ToMe(fused=True),
    "DynamicViT": DynamicViT,
    "SiT": SiT,
    "Sinkhorn": lambda dim, kept, patches: Sinkhorn(dim, kept),
    "PatchMerger": lambda dim, kept, patches: PatchMerger(dim, kept),
}
ONCE = ("DynamicViT", "SiT", "Sinkhorn", "PatchMerger")  # reduce once (the paper's schedule const)
OFF_THE_SHELF = tuple(name for name in SYSTEMS if name not in (*ONCE, "DPC-KNN, learned weights"))

__all__ = ["OFF_THE_SHELF", "ONCE", "SYSTEMS", "Reduced", "ReducedClassifier"]
