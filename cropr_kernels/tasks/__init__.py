"""What a pruned backbone is trained for: heads, auxiliary targets and losses, usable in any training loop.

Every task is a module around a backbone. In training task(images, target) returns a dict of scalar losses whose sum is
the loss; in eval task(images) returns predictions.
"""

from .classification import Classifier as Classifier
from .detection import Detector as Detector
from .segmentation import Segmenter as Segmenter
