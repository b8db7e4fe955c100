"""The ops of namespace ``cropr``: importing this package registers ``torch.ops.cropr``."""

from .registration import NAMES as NAMES
from .registration import build_info as build_info
from .registration import cpp_library as cpp_library
from .registration import schemas as schemas
