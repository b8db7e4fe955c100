"""Token Cropr for PyTorch: Vision Transformers that drop the tokens their task does not need.

Importing the package registers
``torch.ops.cropr.{scores,select,prune,gather,restore,attend,merge,...}``.

    import cropr_kernels as cropr

    cropr.apply(model, rate=8, llf=True)  # in place
    loss = cropr.loss(criterion, *model(images), target)  # (output, auxiliary predictions)
    fast = cropr.deploy(model)  # a copy for inference
"""

from . import ops as ops
from .calibration import agreement as agreement
from .calibration import calibrate as calibrate
from .exporting import export as export
from .inference.predictor import Predictor as Predictor
from .models.adapters import ModelSpec as ModelSpec
from .models.adapters import find_spec as find_spec
from .models.pixels import Pixels as Pixels
from .models.vit import ViT as ViT
from .models.vit import ViTConfig as ViTConfig
from .models.vit import create_vit as create_vit
from .ops import Split as Split
from .pruning.api import apply as apply
from .pruning.api import remove as remove
from .pruning.api import set_llf as set_llf
from .pruning.api import set_progress as set_progress
from .pruning.api import set_rate as set_rate
from .pruning.deployment import deploy as deploy
from .pruning.fusion import Fusion as Fusion
from .pruning.image_lists import forward_images as forward_images
from .pruning.maps import merge_map as merge_map
from .pruning.maps import pruning_map as pruning_map
from .pruning.masks import pad_images as pad_images
from .pruning.masks import protect_boxes as protect_boxes
from .pruning.merging import Merge as Merge
from .pruning.model import features as features
from .pruning.module import Cropr as Cropr
from .pruning.module import Scorer as Scorer
from .pruning.module import loss as loss
from .pruning.saving import from_pretrained as from_pretrained
from .pruning.saving import load as load
from .pruning.saving import save as save
from .pruning.windows import Windows as Windows
from .query_files import load_queries as load_queries
from .query_files import save_queries as save_queries
from .schedule import Schedule as Schedule
from .tuning import tune as tune
from .vlm.api import num_image_tokens as num_image_tokens
from .vlm.api import prune_image_tokens as prune_image_tokens
from .vlm.api import restore_image_tokens as restore_image_tokens
from .vlm.calibration import calibrate_image_tokens as calibrate_image_tokens

__version__ = "0.1.0"
