"""Fewer image tokens into a language model: what stays equal, and what a prompt loses."""

import copy
import pickle
import threading

import pytest
import torch
from helpers import vlm
from helpers.vlm import GREEDY, cache_of, full_positions, masked

import cropr_kernels as cropr
from cropr_kernels.vlm.answers import takes_features
from cropr_kernels.vlm.shortening import shorten

SEVERAL = "several images, left padding"
CASES = {
    "two rows": {},
    SEVERAL: {"images": (2, 1), "texts": (3, 5)},
    "one row": {"images": (2,), "texts": (3,)},
    "right padding": {"images": (1, 1), "texts": (6, 3), "pad": "right"},
}


def pruned(name, keep=0.4, **options):
    model = vlm.make(name)
    torch.manual_seed(2)
    query = torch.randn(32)
    return cropr.prune_image_tokens(model, keep, query=query, **options)


@pytest.mark.parametrize("name", vlm.MODELS)
@torch.no_grad()
def test_keeping_all_is_equal_to_the_bit(name):
    plain = vlm.make(name)
    model = pruned(name, keep=1.0)
    inputs = vlm.inputs_for(name, images=(2, 1))
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))


@pytest.mark.each_choice
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", vlm.MODELS)
@torch.no_grad()
def test_dropping_equals_masking_at_the_same_positions(name, case):
    plain = vlm.make(name)
    model = pruned(name)
    inputs = vlm.inputs_for(name, **CASES[case])
    pad_left = CASES[case].get("pad") != "right"
    shortened, columns = shorten(model, inputs, None, pad_left)
    assert columns.index.shape[1] < inputs["input_ids"].shape[1]
    plain(**inputs)  # 3-D positions are those of the full prompt
    positions = full_positions(plain, inputs)
    expected = plain(**masked(plain, inputs, columns), position_ids=positions).logits
    logits = model(**inputs).logits
    present = shortened["attention_mask"].bool()
    expected = expected.gather(1, columns.index.clamp_min(0).unsqueeze(-1).expand(-1, -1, 60))
    torch.testing.assert_close(logits[present], expected[present], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        logits[present],
        plain(**inputs).logits.gather(
            1, columns.index.clamp_min(0).unsqueeze(-1).expand(-1, -1, 60)
        )[present],
    )


@pytest.mark.parametrize("name", vlm.MODELS)
@torch.no_grad()
def test_generating_equals_masking_at_the_same_positions(name):
    _, answer, expected = generated(name)
    assert torch.equal(answer.sequences, expected.sequences)
    for scores, others in zip(answer.scores, expected.scores):
        torch.testing.assert_close(scores, others, rtol=1e-5, atol=1e-5)


def generated(name, case=SEVERAL, **options):
    """Generate after a shortened prompt, and after the full one with the same tokens masked."""
    plain = vlm.make(name)
    model = pruned(name)
    inputs = vlm.inputs_for(name, **CASES[case])
    positions = plain._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    _, columns = shorten(model, inputs, positions, True)
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, **options}
    expected = plain.generate(**masked(plain, inputs, columns), position_ids=positions, **options)
    return columns, model.generate(**inputs, **options), expected


MANNERS = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 7},
    "without a cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "output_scores": False},
}


@pytest.mark.each_choice
@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("name", ["LLaVA", "PaliGemma", "Gemma3", "SmolVLM", "Qwen3-VL"])
@torch.no_grad()
def test_generating_in_any_manner_equals_masking(name, manner):
    if manner == "chunked prefill" and name in ("PaliGemma", "Gemma3"):
        pytest.skip("chunks cut its bidirectional attention, with and without pruning")
    if manner == "chunked prefill" and name == "Qwen3-VL" and not takes_features(vlm.make(name)):
        pytest.skip("transformers before 5.18 cut no 3-D positions into chunks, pruning or not")
    # Beams of transformers before 5.24 mix up the images of a row
    case = {"prompt lookup": "one row", "beams": "two rows"}.get(manner, SEVERAL)
    _, answer, expected = generated(name, case, **MANNERS[manner])
    assert torch.equal(answer.sequences, expected.sequences)
    for scores, others in zip(answer.scores or (), expected.scores or ()):
        torch.testing.assert_close(scores, others, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["LLaVA", "Gemma3", "Qwen2-VL"])
@torch.no_grad()
def test_a_chat_goes_on_from_the_cache_of_a_shortened_prompt(name):
    model = pruned(name)
    inputs = vlm.inputs_for(name, images=(2, 1), texts=(3, 5))
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[20, 21, 22]] * 2)], 1)
    added = ids.shape[1] - inputs["input_ids"].shape[1]
    turn = {
        label: torch.nn.functional.pad(value, (0, added), value=int(label == "attention_mask"))
        for label, value in inputs.items()
        if label in ("attention_mask", "mm_token_type_ids", "token_type_ids")
    }
    again = {**inputs, **turn, "input_ids": ids}
    # All of the conversation once more, without a cache
    expected = model.generate(**again, **GREEDY)
    cached = {k: v for k, v in again.items() if k in ("input_ids", *turn)}
    answer = model.generate(**cached, past_key_values=cache_of(first), **GREEDY)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize("mask_of", [None, "full prompt", "shortened prompt"])
@pytest.mark.parametrize("name", ["LLaVA", "PaliGemma", "Qwen2.5-VL"])
@torch.no_grad()
def test_a_loop_of_forwards_generates_the_same(name, mask_of):
    model = pruned(name)
    images, texts = ((1, 2), (4, 4)) if mask_of == "full prompt" else ((1,), (4,))
    inputs = vlm.inputs_for(name, images, texts)
    expected = model.generate(**inputs, **GREEDY)
    output = model(**inputs, use_cache=True)
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"]
    if mask_of == "shortened prompt":
        mask = mask[:, : output.logits.shape[1]]
    for _ in range(4):
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        extra = {} if mask_of is None else {"attention_mask": mask}
        if name == "PaliGemma":
            extra["token_type_ids"] = torch.ones_like(ids[:, -1:])
        output = model(ids[:, -1:], past_key_values=cache_of(output), use_cache=True, **extra)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("name", ["LLaVA", "Qwen3-VL"])
def test_training_takes_the_labels_of_the_full_prompt(name):
    model = pruned(name).train()
    inputs = vlm.inputs_for(name, images=(2, 1), texts=(3, 5), pad="right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == vlm.IMAGE, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, labels=labels)
    shortened, _ = shorten(model, inputs | {"labels": labels}, None, False)
    assert output.logits.shape[:2] == shortened["labels"].shape
    assert (shortened["labels"] >= 0).sum() == (labels >= 0).sum()
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), shortened["labels"][:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    tower = getattr(model.model, "vision_tower", None) or model.model.visual
    gradients = [parameter.grad for parameter in tower.parameters()]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_the_trainer_of_transformers_runs_as_it_is(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    t = vlm.transformers()
    model = pruned("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == vlm.IMAGE, -100)
    options = t.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    samples = [{name: value[row] for name, value in inputs.items()} for row in (0, 1)]
    before = model.lm_head.weight.detach().clone()
    result = t.Trainer(model=model, args=options, train_dataset=samples * 2).train()
    assert result.global_step == 2 and result.training_loss > 0
    assert not torch.equal(model.lm_head.weight, before)


@torch.no_grad()
def test_threads_do_not_see_each_other():
    model = pruned("LLaVA")
    batches = [vlm.inputs_for("LLaVA", (1, 1), texts) for texts in ((4, 4), (2, 7))]
    expected = [model.generate(**batch, **GREEDY) for batch in batches]
    failures = []

    def work(index):
        for _ in range(5):
            forward = model(**batches[index]).logits.argmax(-1)
            if not torch.equal(forward[:, -1], expected[index][:, -4]):
                failures.append("forward")
            if not torch.equal(model.generate(**batches[index], **GREEDY), expected[index]):
                failures.append("generate")

    threads = [threading.Thread(target=work, args=(index % 2,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@torch.no_grad()
def test_a_copy_and_a_pickled_model_prune_on_their_own():
    model = pruned("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = model.generate(**inputs, **GREEDY)
    for other in others:
        assert torch.equal(other.generate(**inputs, **GREEDY), expected)
        other.cropr_image_tokens.keep = 1.0
        assert other(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    assert model(**inputs).logits.shape[1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2.5-VL"])
@torch.no_grad()
def test_a_model_changes_its_dtype_and_is_saved(name, tmp_path):
    tower = cropr.Schedule(ratio=0.9) if name in vlm.PACKED else None
    model = pruned(name, tower=tower)
    inputs = vlm.inputs_for(name)
    cropr.calibrate_image_tokens(model, [inputs])
    length = model(**inputs).logits.shape[1]
    model.save_pretrained(tmp_path)
    model.to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16 and logits.shape[1] == length
    assert logits.isfinite().all()
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_restoring_leaves_the_model_as_it_was(tmp_path):
    plain = vlm.make("LLaVA")
    model = pruned("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    assert set(model.state_dict()) == set(plain.state_dict())
    model.generate(**inputs, **GREEDY)
    cropr.restore_image_tokens(model)
    assert vars(model).keys() == vars(plain).keys()
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@torch.no_grad()
def test_counts_are_known_beforehand():
    model = pruned("LLaVA", keep=0.3)
    assert cropr.num_image_tokens(model, 64) == 20
    inputs = vlm.inputs_for("LLaVA")
    length = inputs["input_ids"].shape[1] - 64 + 20
    assert model(**inputs).logits.shape[1] == length
    model.cropr_image_tokens.keep = 7
    assert cropr.num_image_tokens(model, 64) == 7 and cropr.num_image_tokens(model, 5) == 5
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] - 64 + 7


@torch.no_grad()
def test_total_lengths_count_the_full_prompt():
    model = pruned("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    total = inputs["input_ids"].shape[1] + 3
    assert model.generate(**inputs, max_length=total, do_sample=False).shape[1] <= total
    answer = model.generate(**inputs, max_length=total, min_length=total, do_sample=False)
    assert answer.shape[1] == total
    config = vlm.transformers().GenerationConfig(
        max_length=total, min_length=total, do_sample=False, pad_token_id=0
    )
    assert torch.equal(model.generate(**inputs, generation_config=config), answer)
    assert config.max_length == total


@torch.no_grad()
def test_positions_of_the_caller_are_those_of_the_kept_tokens():
    model = pruned("LLaVA")
    inputs = vlm.inputs_for("LLaVA", images=(2, 1))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, position_ids=positions, **GREEDY), expected)
    forward = model(**inputs, position_ids=positions).logits
    _, columns = shorten(model, inputs, positions, True)
    plain = vlm.make("LLaVA")
    full = plain(**masked(plain, inputs, columns), position_ids=positions).logits
    rows, columns_kept = (columns.index >= 0).nonzero().T
    expected = full[rows, columns.index[rows, columns_kept]]
    torch.testing.assert_close(forward[rows, columns_kept], expected, rtol=1e-5, atol=1e-5)


def test_the_text_of_a_model_names_what_is_pruned():
    assert "ImageTokens(keep=0.4, by a query" in repr(pruned("LLaVA"))
    even = cropr.prune_image_tokens(vlm.make("Qwen2-VL"), 7, tower=cropr.Schedule(ratio=0.9))
    assert "keep=7, evenly spaced" in repr(even) and str(cropr.Schedule(ratio=0.9)) in repr(even)


@torch.no_grad()
def test_a_text_alone_passes():
    plain = vlm.make("Qwen2-VL")
    model = pruned("Qwen2-VL")
    ids = torch.arange(9, 20).unsqueeze(0)
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))


@torch.no_grad()
def test_a_prompt_without_a_mask_is_not_taken_for_a_packed_one():
    model = pruned("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    expected = model(**inputs, use_cache=False).logits
    answer = model.generate(**inputs, **GREEDY)
    del inputs["attention_mask"]
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected)
    assert torch.equal(model.generate(**inputs, **GREEDY), answer)
    model.generation_config.pad_token_id = None
    assert torch.equal(model.generate(**inputs, **GREEDY), answer)


@torch.no_grad()
def test_refusals_of_caches_and_arguments_name_the_reason():
    model = pruned("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    cache = cache_of(model(**inputs, use_cache=True))
    length = cache.get_seq_length()
    with pytest.raises(ValueError, match=f"needs an empty cache, got one of {length} tokens"):
        model(**inputs, past_key_values=cache)
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"goes on with input_ids \(B, L\), got .*inputs_embeds"):
        model(inputs_embeds=embeds[:, -1:], past_key_values=cache)
    with pytest.raises(ValueError, match=r"takes input_ids, .*, got 0 more .* inputs_embeds"):
        model.generate(**inputs, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="all others by name, got 1 more without a name"):
        model.generate(ids, model.generation_config, **inputs)


def encoder_decoder(model):
    model.config.is_encoder_decoder = True


def no_placeholder(model):
    model.config.image_token_id = None


def no_decoder(model):
    model.get_decoder = lambda: None


def no_positions(model):
    class Pooled(type(model)):
        def forward(self, input_ids, pixel_values, attention_mask):
            raise NotImplementedError

    model.__class__ = Pooled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (encoder_decoder, "it has an encoder for its prompt"),
        (no_placeholder, "its configuration names no image_token_id"),
        (no_decoder, "it has no language model of its own"),
        (no_positions, "its forward takes no position_ids"),
    ],
)
def test_a_model_of_another_structure_is_refused(change, message):
    model = vlm.make("LLaVA")
    change(model)
    with pytest.raises(TypeError, match=rf"cropr\.prune_image_tokens: .* pruned: {message}"):
        cropr.prune_image_tokens(model, 0.5)


def test_refusals_name_the_reason():
    model = pruned("LLaVA")
    inputs = vlm.inputs_for("LLaVA")
    with pytest.raises(ValueError, match="image tokens are pruned already"):
        cropr.prune_image_tokens(model, 4)
    with pytest.raises(ValueError, match=r"keep must be .*\(0, 1\]"):
        cropr.prune_image_tokens(vlm.make("LLaVA"), 1.5)
    with pytest.raises(ValueError, match=r"query must be \(32,\), got \(3,\)"):
        cropr.prune_image_tokens(vlm.make("LLaVA"), 0.5, query=torch.ones(3))
    with pytest.raises(TypeError, match="image tokens are not pruned"):
        cropr.num_image_tokens(vlm.make("LLaVA"), 4)
    with pytest.raises(TypeError, match="no generating model of transformers"):
        cropr.prune_image_tokens(torch.nn.Linear(2, 2), 0.5)
    with pytest.raises(TypeError, match="no get_image_features"):
        cropr.prune_image_tokens(text_model(), 0.5)
    with pytest.raises(ValueError, match="has 126 image placeholders, the images have 128 tokens"):
        model(**{key: value[:, 3:] if value.ndim == 2 else value for key, value in inputs.items()})
    with pytest.raises(ValueError, match=r"attention_mask .* must be \(B, L\)"):
        model(**inputs | {"attention_mask": torch.ones(2, 1, 71, 71)})
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="needs input_ids"):
        model(**inputs, inputs_embeds=embeds)


def text_model():
    t = vlm.transformers()
    return t.LlamaForCausalLM(t.LlamaConfig(**vlm.TEXT))
