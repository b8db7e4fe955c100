"""CUDA graphs of deployed models: when a forward is captured, and on a GPU the results of
replays."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from helpers.graphs import CountingGraphs
from helpers.models import MODELS, randomize, reference_vit
from torch.utils.flop_counter import FlopCounterMode

import cropr_kernels as cropr
from cropr_kernels.pruning.deployment import deployed_copy, hold_graphs
from cropr_kernels.pruning.graphs import CAPACITY, PATCHES, PATIENCE, GraphedForward
from cropr_kernels.pruning.model import run as pruned_run
from cropr_kernels.pruning.state import PruningOptions

pytestmark = pytest.mark.usefixtures("two_threads")


def deployed(monkeypatch, capacity=2, model=None, **options):
    """Return a deployed model whose tensors count as those of a GPU, and its graphs, which need
    none."""
    model = cropr.deploy(cropr.apply(randomize(model or reference_vit()).eval(), rate=8), **options)
    on_gpu(monkeypatch)
    model.cropr.graphs = CountingGraphs(capacity)
    return model, model.cropr.graphs


def on_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def photos(batch=2):
    return torch.randn(batch, 3, 64, 64)


def test_deploy_captures_small_batches_unless_cuda_graphs_is_0():
    model = cropr.apply(reference_vit(), rate=8)
    fast = cropr.deploy(model)
    assert (fast.cropr.graphs.capacity, fast.cropr.graphs.patience) == (CAPACITY, PATIENCE)
    assert GraphedForward.of(fast).max_patches == PATCHES
    asked = cropr.deploy(fast, cuda_graphs=3)  # a copy of a copy is captured anew
    assert (asked.cropr.graphs.capacity, asked.cropr.graphs.patience) == (3, 0)
    assert GraphedForward.of(asked).model is asked and GraphedForward.of(
        asked
    ).max_patches == float("inf")
    for plain in (cropr.deploy(fast, cuda_graphs=0), deployed_copy(model)):
        assert plain.cropr.graphs is None and "forward" not in vars(plain)
    with pytest.raises(ValueError, match="cuda_graphs must be >= 0, got -1"):
        cropr.deploy(model, cuda_graphs=-1)
    assert "forward" not in vars(cropr.remove(fast))


def test_many_schedules_in_turns_may_each_have_a_graph():
    model = cropr.apply(reference_vit(), rate=8)
    fast, plain = deployed_copy(model, cuda_graphs=None), deployed_copy(model)
    for holder in (fast, plain):
        hold_graphs(holder, 30)
        hold_graphs(holder, 3)
    assert fast.cropr.graphs.capacity == 30 and plain.cropr.graphs is None


def test_a_replaced_forward_stays():
    model = cropr.apply(reference_vit().eval(), rate=8)
    model.forward = lambda images: "theirs"
    assert cropr.deploy(model)(photos()) == "theirs"


def test_a_model_replays_one_graph_for_each_shape(monkeypatch):
    model, graphs = deployed(monkeypatch)
    eager = copy.deepcopy(model)
    eager.cropr.graphs = None
    for batch in (1, 2, 1, 2):
        images = photos(batch)
        assert torch.equal(model(images), eager(images))
        assert torch.equal(model(images=images), eager(images=images))
    # Two shapes, two ways to call, two graphs at a time
    assert graphs.captures == 8 and len(graphs.captured) == 2


def test_masks_are_inputs_of_a_graph(monkeypatch):
    model, graphs = deployed(monkeypatch)
    eager = copy.deepcopy(model)
    eager.cropr.graphs = None
    for _ in range(3):
        images, protect = photos(), torch.rand(2, 8, 8) > 0.8
        assert torch.equal(model(images, protect=protect), eager(images, protect=protect))
    assert graphs.captures == 1
    padding = torch.zeros(2, 8, 8, dtype=torch.bool)
    padding[:, 6:] = True
    assert torch.equal(model(images, padding=padding), eager(images, padding=padding))
    assert graphs.captures == 2


def test_whatever_changes_the_result_captures_anew(monkeypatch):
    model, graphs = deployed(monkeypatch, capacity=99)
    eager = copy.deepcopy(model)
    eager.cropr.graphs = None
    images = photos()

    def captures():
        before = graphs.captures
        got = model(images)
        assert model(images).shape == got.shape
        return graphs.captures - before

    assert captures() == 1 and captures() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert captures() == 1
    with torch.autocast("cpu", dtype=torch.float16):
        assert captures() == 1
    with torch.no_grad():
        assert captures() == 1
    cropr.set_rate(model, 4)
    assert captures() == 1
    cropr.set_rate(model, 8)
    model.blocks[1].mlp.fc1 = copy.deepcopy(model.blocks[1].mlp.fc1)
    assert captures() == 1
    model.blocks[1].mlp.fc1.weight = copy.deepcopy(model.blocks[1].mlp.fc1.weight)
    assert captures() == 1
    model.blocks[2].mlp.fc1.bias.data = model.blocks[2].mlp.fc1.bias.data + 1
    assert captures() == 1
    torch.use_deterministic_algorithms(True)
    assert captures() == 1
    torch.use_deterministic_algorithms(False)
    swapped = {"head.bias": eager.head.bias + 3}
    torch.testing.assert_close(
        torch.func.functional_call(model, swapped, (images,)), model(images) + 3
    )
    assert captures() == 0


def test_a_graph_keeps_the_weights_of_its_key_alive(monkeypatch):
    """The key of a graph holds addresses of weights, which must not be reused while it exists."""
    model, graphs = deployed(monkeypatch)
    model(photos())
    before = weakref.ref(model.head.weight)
    model.head.weight = torch.nn.Parameter(torch.randn_like(model.head.weight), requires_grad=False)
    model(photos())
    gc.collect()
    assert graphs.captures == 2 and before() is not None
    graphs.captured.popitem(last=False)
    gc.collect()
    assert before() is None


@pytest.mark.parametrize("where", ["blocks.1.mlp", "norm", "patch_embed.proj", "head"])
def test_hooks_see_every_call_and_get_no_graph(where, monkeypatch):
    model, graphs = deployed(monkeypatch)
    images = photos()
    expected = model(images)
    seen = []
    handle = model.get_submodule(where).register_forward_hook(lambda *args: seen.append(where))
    for i in range(3):
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert len(seen) == i + 1 and graphs.captures == graphs.replays == 1
    handle.remove()
    model(images)
    assert len(seen) == 3 and graphs.replays == 2
    # Outside of the captured forward
    around = model.register_forward_hook(lambda *args: seen.append("model"))
    captures = graphs.captures
    model(images)
    assert seen[3:] == ["model"] and graphs.captures == captures
    around.remove()


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::torch.jit.TracerWarning")
def test_nothing_is_captured_if_a_replay_would_be_wrong(monkeypatch):
    model, graphs = deployed(monkeypatch)
    images = photos()
    expected = model(images)
    assert graphs.captures == 1
    graphs.captured.clear()
    model(photos().requires_grad_()).sum().backward()
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert counter.get_total_flops() > 0
    model.train()(images)
    model.eval()
    assert torch.func.vmap(lambda image: model(image[None])[0])(images).shape == expected.shape
    assert cropr.pruning_map(model, images).shape == (2, 8, 8)
    assert pruned_run(model, lambda: model(images), PruningOptions(engine=True))[1].num_tokens == 65
    assert model(images[:0]).shape == (0, 5)
    torch.jit.trace(model, images, check_trace=False)
    assert torch.export.export(model, (images,)).module()(images).shape == expected.shape
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model(images)
    monkeypatch.undo()
    on_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model(images)
    monkeypatch.undo()
    model(images)  # on the CPU
    assert not graphs.captured and graphs.captures == graphs.replays == 1


def test_large_batches_are_not_captured(monkeypatch):
    model, graphs = deployed(monkeypatch)
    assert GraphedForward.of(model).max_patches == PATCHES
    GraphedForward.of(model).max_patches = 2 * 64
    model(photos(3))
    assert graphs.captures == 0
    model(photos(2))
    assert graphs.captures == 1


def test_shapes_that_alternate_do_not_evict_each_other(monkeypatch):
    model, graphs = deployed(monkeypatch)
    graphs.patience = PATIENCE
    for _ in range(3):
        for batch in (1, 2, 3):
            assert model(photos(batch)).shape == (batch, 5)
    assert graphs.captures == 2


def test_a_model_that_cannot_be_captured_warns_once_and_runs(monkeypatch):
    model, graphs = deployed(monkeypatch)
    graphs.cannot_capture, images = True, photos()
    with pytest.warns(
        UserWarning, match="without CUDA graphs, as it cannot be captured: an operation waits"
    ):
        got = model(images)
    assert torch.equal(model(images), got)


def test_threads_get_their_own_results(monkeypatch):
    model, graphs = deployed(monkeypatch)
    batches = [photos() for _ in range(4)]
    expected, wrong = [model(images) for images in batches], []

    def call(images, result):
        wrong.extend(i for i in range(10) if not torch.equal(model(images), result))

    threads = [threading.Thread(target=call, args=pair) for pair in zip(batches, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and graphs.captures == 1


@pytest.mark.parametrize(
    "schedule",
    [
        {"rate": 8},
        {"keep": [40, 30, 20]},
        {"ratio": 0.5},
        {"const": [2, 25]},
        {"keep": (40, 30, 20)},
    ],
    ids=str,
)
def test_every_schedule_is_hashable(schedule):
    models = [cropr.deploy(cropr.apply(reference_vit(), **schedule)) for _ in range(2)]
    assert models[0].cropr.config == models[1].cropr.config
    assert len({model.cropr.config for model in models}) == 1


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_replayed_graphs_give_the_eager_result(name, dtype):
    model = cropr.apply(randomize(MODELS[name]()).eval().to("cuda", dtype), rate=8, llf=True)
    graphed, eager = cropr.deploy(model), cropr.deploy(model, cuda_graphs=0)
    for batch in (1, 2, 3, 1):
        images = torch.randn(batch, 3, 64, 64, dtype=dtype, device="cuda")
        assert torch.equal(graphed(images), eager(images))
    assert len(graphed.cropr.graphs.captured) == 3


@pytest.mark.gpu
def test_graphs_do_not_swallow_gradients():
    model = cropr.deploy(cropr.apply(reference_vit().eval(), rate=8)).cuda()
    images = torch.randn(1, 3, 64, 64, device="cuda", requires_grad=True)
    model(images).sum().backward()
    assert images.grad.abs().sum() > 0 and not model.cropr.graphs.captured


@pytest.mark.gpu
def test_streams_that_take_turns_on_one_graph_get_their_own_results():
    model = cropr.deploy(cropr.apply(randomize(reference_vit()).eval(), rate=8)).cuda()
    eager, streams = cropr.deploy(model, cuda_graphs=0), [torch.cuda.Stream() for _ in range(3)]
    # Graphs that share memory
    batches = [torch.randn(1 + i % 4, 3, 64, 64, device="cuda") for i in range(60)]
    expected = [eager(images) for images in batches]
    torch.cuda.synchronize()
    got = []
    for i, images in enumerate(batches):
        with torch.cuda.stream(streams[i % 3]):
            got.append(model(images))
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected)) and len(model.cropr.graphs.captured) == 4


@pytest.mark.gpu
def test_replays_survive_the_end_of_autocast():
    model = cropr.deploy(cropr.apply(randomize(reference_vit()).eval(), rate=8)).cuda()
    eager, images = cropr.deploy(model, cuda_graphs=0), torch.randn(2, 3, 64, 64, device="cuda")
    model.requires_grad_()  # autocast keeps the casts of weights that learn
    eager.requires_grad_()
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            expected = eager(images)
            assert torch.equal(model(images), expected)
        torch.randn(1 << 22, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(model(images), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_graphs_replay_while_another_device_is_current():
    model = cropr.deploy(cropr.apply(randomize(reference_vit()).eval(), rate=8)).to("cuda:1")
    eager = cropr.deploy(model, cuda_graphs=0)
    for _ in range(3):
        images = torch.randn(2, 3, 64, 64, device="cuda:1")
        with torch.cuda.device(0):
            assert torch.equal(model(images), eager(images))
