"""Training recipes: from a configuration to a checkpoint, on one machine or many, resumable at any
step."""

from .config import PRESETS as PRESETS
from .config import Config as Config
from .loop import train as train
