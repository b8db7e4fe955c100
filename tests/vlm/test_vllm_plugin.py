"""The plugin of vLLM, with stand-ins for what it takes from vLLM: its interface, not vLLM."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import vlm

FOLDER = Path(__file__).parents[2] / "examples" / "vllm"


@dataclasses.dataclass
class Update:
    modality: str
    replacement: object


class Processor:
    def _get_prompt_updates(self, counts):
        def image(item):
            return [5] * counts[item]

        return [Update("image", image), Update("video", None)]


class Model:
    is_multimodal_pruning_enabled = True

    def __init__(self, **kwargs):
        pass

    def _postprocess_image_embeds_evs(self, images, image_input):
        return tuple(
            torch.cat([rows, positions], 1) for rows, positions in zip(images, image_input)
        )

    def get_mrope_input_positions(self, input_tokens, mm_features):
        return torch.arange(mm_features).expand(3, -1), 0


@pytest.fixture
def plugin(monkeypatch):
    registered = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)
    models = ModuleType("vllm.model_executor.models.qwen2_5_vl")
    for name, value in {
        "DummyInputsBuilder": object,
        "ForConditionalGeneration": Model,
        "MultiModalProcessor": Processor,
        "ProcessingInfo": object,
    }.items():
        setattr(models, f"Qwen2_5_VL{name}", value)
    multimodal = ModuleType("vllm.multimodal")
    multimodal.MULTIMODAL_REGISTRY = SimpleNamespace(
        register_processor=lambda processor, **parts: lambda model: model
    )
    for module in (vllm, models, multimodal):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    folder = FOLDER / "cropr_vllm"
    spec = importlib.util.spec_from_file_location(
        "cropr_vllm", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cropr_vllm", package)
    spec.loader.exec_module(package)
    package.register()
    module, _, name = registered[package.ARCHITECTURE].partition(":")
    yield getattr(importlib.import_module(module), name), importlib.import_module(module)
    sys.modules.pop("cropr_vllm.model", None)


@pytest.mark.parametrize("keep", ["0.3", "4"])
def test_prompts_have_as_many_placeholders_as_images_have_rows(plugin, keep, monkeypatch, tmp_path):
    model_class, module = plugin
    torch.manual_seed(0)
    query = torch.randn(6)
    torch.save(query, tmp_path / "query.pt")
    monkeypatch.setenv("CROPR_KEEP", keep)
    monkeypatch.setenv("CROPR_QUERY", str(tmp_path / "query.pt"))
    images = [torch.randn(count, 6) for count in (10, 7)]
    positions = [torch.arange(4 * len(rows)).unflatten(0, (-1, 4)).float() for rows in images]
    kept = model_class()._postprocess_image_embeds_evs(images, positions)
    image, video = module.PrunedProcessor()._get_prompt_updates([10, 7])
    assert [len(image.replacement(item)) for item in range(2)] == [len(rows) for rows in kept]
    assert video.replacement is None
    for rows, all_rows, places in zip(kept, images, positions):
        expected = vlm.best_of_runs(all_rows @ query, len(rows))
        assert torch.equal(rows[:, :6], all_rows[expected])
        assert torch.equal(rows[:, 6:], places[expected])  # true positions
    for count in (9, 20):
        shortened, _ = model_class().get_mrope_input_positions([0] * 12, count)
        assert shortened.shape == (3, 12)


def test_the_plugin_needs_positions_to_be_recomputed(plugin, monkeypatch):
    model_class, _ = plugin
    monkeypatch.setattr(Model, "is_multimodal_pruning_enabled", False)
    with pytest.raises(ValueError, match="only with --video-pruning-rate above 0"):
        model_class()
