"""Ops on a batch without images."""

import pytest
import torch
from helpers.cases import legal_call

from cropr_kernels.ops import NAMES
from cropr_kernels.ops.definitions import DEFINITIONS
from cropr_kernels.ops.validation import OPS

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("name", NAMES)
def test_without_images_every_result_is_that_of_the_definition(kernels, name):
    args = legal_call(name, B=0)
    for input in OPS[name].inputs:
        if input.name == "starts":
            args["starts"] = args["starts"][:1]
            args |= {"longest": 0} if "longest" in args else {}
        elif input.shapes[-1][0] in ((1, "B"), (1, "T")):
            args[input.name] = args[input.name][:0]
    got, expected = getattr(kernels, name)(**args), DEFINITIONS[name](**args)
    for a, b in zip(*(part if isinstance(part, tuple) else (part,) for part in (got, expected))):
        assert a is b is None or (torch.equal(a, b) and a.dtype == b.dtype)
