"""The ops of namespace ``cropr``: importing this package registers ``torch.ops.cropr``."""

from . import registration as registration
from .extension import NAMES as NAMES
from .extension import build_info as build_info
from .extension import cpp_library as cpp_library
from .functional import Merged as Merged
from .functional import Pruned as Pruned
from .functional import add_ as add_
from .functional import add_norm_ as add_norm_
from .functional import add_select_ as add_select_
from .functional import attend as attend
from .functional import attend_scores as attend_scores
from .functional import gather as gather
from .functional import gather_norm as gather_norm
from .functional import merge as merge
from .functional import merge_ as merge_
from .functional import prune as prune
from .functional import restore as restore
from .functional import rotate_ as rotate_
from .functional import scores as scores
from .functional import select as select
from .functional import split as split
