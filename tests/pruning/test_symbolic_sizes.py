"""Sizes and counts are symbols to torch.export and torch.compile: one program for many of them."""

import pytest
import torch
from helpers.models import BLOCK_RUNNERS, MODELS, outputs_of, randomize, reference_vit
from torch._dynamo.testing import CompileCounter

import cropr_kernels as cropr

# Every family, every kind of schedule and every option, deployed and not
CASES = [
    ("timm ViT, any size", {"rate": 2, "merge": True, "llf": True}, True),
    ("reference, rotary", {"rate": 2, "llf": "as_pruned"}, False),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("reference", {"rate": 0}, True),
            ("DINOv3", {"ratio": 0.9, "llf": "track_parent"}, False),
            ("DINOv3", {"keep": [20, 15, 13]}, True),
            ("reference", {"ratio": 0.5, "merge": cropr.Merge(2.5)}, False),
            ("timm ViT, any size", {"const": (2, 9)}, False),
        )
    ),
]
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


@pytest.mark.parametrize(("name", "options", "deployed"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_program_takes_images_of_other_sizes(name, options, deployed):
    model = cropr.apply(
        randomize({**MODELS, **BLOCK_RUNNERS}[name]()).eval(), num_outputs=0, **options
    )
    model = cropr.deploy(model) if deployed else model
    program = torch.export.export(
        model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=(DYNAMIC,)
    ).module()
    for size in ((1, 3, 64, 64), (2, 3, 48, 40), (3, 3, 160, 80)):
        images = torch.randn(size)
        torch.testing.assert_close(
            outputs_of(program(images)), outputs_of(model(images)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore:cropr.deploy. the queries are random")
@pytest.mark.each_choice
@pytest.mark.parametrize("change", ["rate", "share"])
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize(
    "options", [{"rate": 12}, {"rate": 12, "merge": True, "llf": True}], ids=str
)
@torch.no_grad()
def test_two_graphs_serve_every_rate(options, deployed, change):
    model = cropr.apply(randomize(reference_vit()).eval(), num_outputs=0, **options)
    model = cropr.deploy(model, cuda_graphs=0) if deployed else model
    images = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(1, 13):
        cropr.set_rate(model, step) if change == "rate" else cropr.set_progress(model, step / 12)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.slow
@torch.no_grad()
def test_inductor_takes_symbolic_rates():
    model = cropr.apply(randomize(reference_vit()).eval(), rate=8, merge=True, num_outputs=0)
    images = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for rate in (4, 6, 7, 11):
        cropr.set_rate(model, rate)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)
