"""Benchmarks of vision-language models: FLOPs, timing, answers of a saved model."""

import json

import pytest
import torch
from helpers import vlm
from helpers.extras import require

from benchmarks.accuracy.vlm import Reader, compare, read_questions
from benchmarks.models.vlm import (
    MODELS,
    llava_1_5_7b_flops,
    measure,
    qwen2_5_vl_7b_flops,
    smolvlm_256m_flops,
)
from benchmarks.report import vlm as report

require("transformers", "PIL")


@pytest.mark.slow
def test_flops_of_llava_1_5_are_those_of_the_table():
    full = llava_1_5_7b_flops(576)
    assert full / llava_1_5_7b_flops(288) == pytest.approx(1.76, rel=0.02)
    assert full / llava_1_5_7b_flops(144) == pytest.approx(2.83, rel=0.02)


@pytest.mark.slow
def test_flops_of_smolvlm_are_those_of_the_table():
    full = smolvlm_256m_flops(1088)
    for tokens, behind, inside in ((544, 1.04, 1.42), (272, 1.06, 1.77)):
        assert full / smolvlm_256m_flops(tokens) == pytest.approx(behind, rel=0.02)
        assert full / smolvlm_256m_flops(tokens, inside=True) == pytest.approx(inside, rel=0.03)


@pytest.mark.slow
def test_flops_of_qwen2_5_vl_are_those_of_the_table():
    full = qwen2_5_vl_7b_flops(1369)
    assert full == pytest.approx(26.678e12, rel=0.03)
    for tokens, behind, inside in ((684, 1.53, 1.73), (342, 2.06, 2.71)):
        assert full / qwen2_5_vl_7b_flops(tokens) == pytest.approx(behind, rel=0.02)
        assert full / qwen2_5_vl_7b_flops(tokens, inside=True) == pytest.approx(inside, rel=0.03)


def test_the_page_has_a_row_a_model_and_place(monkeypatch):
    common = {"prompt tokens": 9, "times fewer FLOPs": 1.5}
    rows = [
        {"model": model, "dropped": dropped, "inside": inside, **common, **timed}
        for model, inside, timed in (
            ("llava_1_5_7b", False, {}),
            ("qwen2_5_vl_small", False, {"times faster": 1.25}),
            ("qwen2_5_vl_small", True, {"times faster": 2.0}),
        )
        for dropped in (0.0, 0.5, 0.75)
        if dropped or not inside
    ]
    env = {"device": "cpu", "torch": "2", "commit": "a", "date": "b"}
    monkeypatch.setattr(report, "load", lambda name: (env, rows))
    lines = report.section().splitlines()
    assert lines[0] == "| FLOPs fewer, speed-up | 50 % | 75 % |"
    assert lines[2] == "| LLaVA-1.5-7B | 1.50x | 1.50x |"
    assert lines[4] == "| small Qwen2.5-VL, inside | 1.50x, 2.00x | 1.50x, 2.00x |"
    assert len(report.table().rows) == 6


@pytest.mark.slow
def test_fewer_image_tokens_need_fewer_flops():
    torch.manual_seed(0)
    model, inputs = MODELS["qwen2_5_vl_small"](scale=4)
    rows = measure("qwen2_5_vl_small", model, inputs, rounds=1)
    settings = [(row["dropped"], row["inside"]) for row in rows]
    assert settings == [(0.0, False), (0.5, False), (0.75, False), (0.5, True), (0.75, True)]
    flops = [row["times fewer FLOPs"] for row in rows]
    assert 1 == flops[0] < flops[1] < flops[2] < flops[4] and flops[1] < flops[3]
    assert not hasattr(model, "cropr_image_tokens")


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "x", "<image>", *(f"w{index}" for index in range(54))]


def saved_model(folder):
    """Save a tiny LLaVA with its processor, and return the folder."""
    t = vlm.transformers()
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 32, "width": 32}
    images = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    processor = t.LlavaProcessor(
        images,
        fast,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    vlm.make("LLaVA").save_pretrained(folder)
    return folder


def test_answers_with_and_without_pruning_are_compared(tmp_path):
    from PIL import Image

    folder = saved_model(tmp_path / "model")
    lines = []
    for index in range(6):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        lines.append({"image": f"{index}.png", "question": f"w1 w{index}"})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    reader = Reader(str(folder), new_tokens=3)
    plain, full, few = compare(reader, read_questions(path), [1.0, 0.05], num_calibration=2)
    assert plain["questions"] == 4 and plain["right answer"] is None
    assert plain["same answer"] == full["same answer"] == 1.0
    assert full["log-probability"] == plain["log-probability"] == plain["log-probability before"]
    assert few["log-probability"] != few["log-probability before"]

    question = read_questions(path)[0]
    inputs = reader.inputs(question)
    answer = reader.answer(inputs)
    scored = reader.model.generate(
        **inputs, max_new_tokens=3, return_dict_in_generate=True, output_scores=True
    )
    steps = [float(score[0].log_softmax(-1)[token]) for score, token in zip(scored.scores, answer)]
    assert reader.log_probability(inputs, answer) == pytest.approx(
        sum(steps) / len(steps), abs=1e-4
    )

    lines[3]["answer"] = reader.text(reader.answer(reader.inputs(read_questions(path)[3])))
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    plain, *_ = compare(reader, read_questions(path), [0.5], num_calibration=0)
    assert plain["right answer"] == 1.0
    path.write_text("{}")
    with pytest.raises(ValueError, match="line 1: needs image and question"):
        read_questions(path)
    with pytest.raises(ValueError, match="needs more than the 9 questions"):
        compare(reader, [question] * 3, [0.5], num_calibration=9)
