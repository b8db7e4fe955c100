"""Token Cropr for PyTorch: Vision Transformers that drop the tokens their task does not need.

Importing the package registers ``torch.ops.cropr.{scores,select,prune,gather,restore,attend,merge}``.

    import cropr_kernels as cropr

    cropr.apply(model, rate=8, llf=True)      # in place; training returns (output, auxiliary predictions)
    loss = cropr.loss(criterion, *model(images), target)
    fast = cropr.deploy(model)                # a copy for inference
"""

from . import ops as ops
from . import schedule as schedule
from .calibration import agreement as agreement
from .calibration import calibrate as calibrate
from .calibration import load_queries as load_queries
from .calibration import save_queries as save_queries
from .exports import export as export
from .maps import merge_map as merge_map
from .maps import pruning_map as pruning_map
from .masks import pad_images as pad_images
from .masks import protect_boxes as protect_boxes
from .merging import Merge as Merge
from .modules import Cropr as Cropr
from .modules import Split as Split
from .modules import loss as loss
from .patch import apply as apply
from .patch import deploy as deploy
from .patch import remove as remove
from .patch import set_progress as set_progress
from .patch import set_rate as set_rate
from .tuning import tune as tune
from .vit import ViT as ViT
from .vit import ViTConfig as ViTConfig
from .vit import create_vit as create_vit
from .windows import Windows as Windows

__version__ = "0.1.0"
