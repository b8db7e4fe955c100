"""Answers of a local vision-language model with fewer image tokens, compared with its own.

python -m benchmarks.accuracy.vlm --model FOLDER --questions FILE [--keep 0.5 0.25] [--calibrate 64]
[--new-tokens 32] [--out FILE]

FILE has a line of JSON a question: {"image": path, "question": text, "answer": text or absent};
paths are relative to FILE. The first `--calibrate` questions set the queries and are not measured;
without them evenly spaced tokens are kept. Rows, one for each share of kept image tokens: the
share of answers that are the unpruned model's word for word, of those that are the answer in FILE
(the unpruned model's in the row 1.0), and the mean log-probability of a token of the unpruned
model's answer, before and after. Ask also about text in images: it suffers first.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cropr_kernels as cropr
from benchmarks.utils.results import Results, environment
from cropr_kernels.utils.optional import import_optional


class Question(NamedTuple):
    image: Path
    question: str
    answer: str | None


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions; ValueError names the line that is none."""
    questions: list[Question] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            image = path.parent / fields["image"]
            questions.append(Question(image, str(fields["question"]), fields.get("answer")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: needs image and question: {error}") from error
    return questions


class Reader:
    """A model with its processor."""

    def __init__(self, folder: str, new_tokens: int):
        t: Any = import_optional("transformers", "test", "benchmarks.accuracy.vlm")
        self.model = t.AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = t.AutoProcessor.from_pretrained(folder)
        self.new_tokens = new_tokens

    def inputs(self, question: Question) -> dict[str, Any]:
        """The inputs of a question: by the chat template, or the image token before the text."""
        images: Any = import_optional("PIL.Image", "demo", "benchmarks.accuracy.vlm")
        image = images.open(question.image).convert("RGB")
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question.question}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        else:
            text = f"{self.processor.image_token} {question.question}"
        return dict(self.processor(images=image, text=text, return_tensors="pt"))

    def answer(self, inputs: dict[str, Any]) -> Tensor:
        """The ids (N,) of the answer."""
        ids = self.model.generate(**inputs, max_new_tokens=self.new_tokens, do_sample=False)
        return ids[0, inputs["input_ids"].shape[1] :]

    def text(self, answer: Tensor) -> str:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return tokenizer.decode(answer, skip_special_tokens=True).strip()

    @torch.no_grad()
    def log_probability(self, inputs: dict[str, Any], answer: Tensor) -> float:
        """Mean log-probability of the tokens of an answer (N,)."""
        count = len(answer)
        masks = {
            name: inputs[name]
            for name in ("attention_mask", "token_type_ids", "mm_token_type_ids")
            if inputs.get(name) is not None
        }
        # As in generation: some models have other token types after the prompt.
        extended = self.model._update_model_kwargs_for_generation({}, masks, num_new_tokens=count)
        ids = torch.cat([inputs["input_ids"], answer.unsqueeze(0)], 1)
        logits = self.model(**{**inputs, **extended, "input_ids": ids}).logits[0, -count - 1 : -1]
        log_probs = logits.float().log_softmax(-1).gather(1, answer.unsqueeze(1))
        return float(log_probs.mean())


@torch.inference_mode()
def compare(
    reader: Reader, questions: Sequence[Question], shares: Sequence[float], num_calibration: int
) -> list[dict[str, Any]]:
    """Rows of all shares, the unpruned model first."""
    calibration, measured = questions[:num_calibration], questions[num_calibration:]
    if not measured:
        raise ValueError(f"needs more than the {num_calibration} questions to calibrate on")
    inputs = [reader.inputs(question) for question in measured]
    plain = [reader.answer(batch) for batch in inputs]
    before = [reader.log_probability(*pair) for pair in zip(inputs, plain)]
    rows = [_row(reader, 1.0, measured, plain, plain, before, before)]
    cropr.prune_image_tokens(reader.model, 1.0)
    if calibration:
        cropr.calibrate_image_tokens(
            reader.model, (reader.inputs(question) for question in calibration)
        )
    for share in shares:
        reader.model.cropr_image_tokens.keep = share
        answers = [reader.answer(batch) for batch in inputs]
        after = [reader.log_probability(*pair) for pair in zip(inputs, plain)]
        rows.append(_row(reader, share, measured, plain, answers, before, after))
    cropr.restore_image_tokens(reader.model)
    return rows


def _row(
    reader: Reader,
    share: float,
    questions: Sequence[Question],
    plain: Sequence[Tensor],
    answers: Sequence[Tensor],
    before: Sequence[float],
    after: Sequence[float],
) -> dict[str, Any]:
    texts = [reader.text(answer) for answer in answers]
    same = [text == reader.text(other) for text, other in zip(texts, plain)]
    right = [
        text.lower() == question.answer.strip().lower()
        for text, question in zip(texts, questions)
        if question.answer is not None
    ]
    return {
        "keep": share,
        "questions": len(texts),
        "same answer": round(sum(same) / len(same), 4),
        "right answer": round(sum(right) / len(right), 4) if right else None,
        "log-probability before": round(sum(before) / len(before), 5),
        "log-probability": round(sum(after) / len(after), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder of transformers")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.75, 0.5, 0.25])
    parser.add_argument("--calibrate", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    questions = read_questions(options.questions)
    reader = Reader(options.model, options.new_tokens)
    rows = compare(reader, questions, options.keep, options.calibrate)
    for row in rows:
        print(row)
    if options.out is not None:
        Results(options.out, environment("cpu")).replace(rows)


if __name__ == "__main__":
    main()
