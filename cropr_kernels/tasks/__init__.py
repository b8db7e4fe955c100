"""Tasks of a pruned backbone: heads, auxiliary targets and losses, usable in any training loop.

A task is a module around a backbone. In training task(images, target) returns a dict of scalar
losses, to be summed; in eval mode task(images) returns predictions.
"""

from .backbone import Task as Task
from .classification import Classifier as Classifier
from .detection import Detector as Detector
from .segmentation import Segmenter as Segmenter
