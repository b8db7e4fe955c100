"""The ops of namespace ``cropr``: importing this package registers ``torch.ops.cropr``."""

from . import registration as registration
from .extension import NAMES as NAMES
from .extension import build_info as build_info
from .extension import cpp_library as cpp_library
from .functional import *  # noqa: F403  (every op)
from .ragged import *  # noqa: F403
