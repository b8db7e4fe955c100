"""Auxiliary predictions of a model in training: beside its output, or in that of a Hugging Face
model."""

import inspect
from collections.abc import Mapping
from dataclasses import make_dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

_classes_with_aux: dict[type, type] = {}


def add_predictions(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    output: Any,
    aux: list[Tensor],
    classes: int,
) -> object:
    """Return (output, aux); of a Hugging Face model its own output with `aux`, and with their
    losses in its loss.

    Args:
        model: called with args and kwargs.
        output: of the model.
        aux: auxiliary predictions, (B, outputs) or (B, M, outputs).
        classes: of the model when its heads were made; 0: it had no classifier.

    Raises:
        ValueError: the classifier that the heads were made for has another width by now.
    """
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        for logits in output if isinstance(output, tuple | list) else (output,):
            _check_width(logits, aux, classes)
        return output, aux
    hf_model: Any = model
    arguments = inspect.signature(hf_model.forward).bind(*args, **kwargs).arguments
    labels = arguments.get("labels")
    is_tuple = isinstance(output, tuple)
    _check_width(
        output[int(labels is not None)] if is_tuple else output.get("logits"), aux, classes
    )
    values: dict[Any, Any] = dict(enumerate(output)) if is_tuple else dict(output)
    if labels is not None:
        criterion = partial(
            hf_model.loss_function, labels, config=hf_model.config, **arguments.get("kwargs", {})
        )
        loss = 0 if is_tuple else "loss"
        values[loss] = sum(map(criterion, map(mean_over_queries, aux)), values[loss])
    return (*values.values(), aux) if is_tuple else _class_with_aux(type(output))(**values, aux=aux)


def mean_over_queries(prediction: Tensor) -> Tensor:
    """Average predictions (B, M, outputs) over several queries; (B, outputs) of one query stays."""
    return prediction if prediction.ndim == 2 else prediction.mean(1)


def _check_width(logits: object, aux: list[Tensor], classes: int) -> None:
    width = aux[0].shape[-1]
    if width == classes and isinstance(logits, Tensor) and logits.shape[-1] != width:
        raise ValueError(
            f"cropr: the auxiliary heads were made for {width} classes, and the model gives "
            f"{logits.shape[-1]}; call "
            f"cropr.apply after the classifier is replaced, or with num_outputs={logits.shape[-1]}"
        )


def _class_with_aux(base: type) -> Any:
    """Return a Hugging Face output class with a field `aux`, so that DDP, as all of pytree, can
    rebuild its outputs."""
    if base not in _classes_with_aux:
        namespace = {"__module__": __name__, "__reduce__": _reduce}
        _classes_with_aux[base] = make_dataclass(
            base.__name__, [("aux", object, None)], bases=(base,), namespace=namespace
        )
    return _classes_with_aux[base]


# torch.compiler.assume_constant_result would load the compiler with the package.
_class_with_aux._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _reduce(output: Mapping[str, object]) -> tuple[object, ...]:
    return _restore, (type(output).__base__, dict(output))


def _restore(base: type, values: Mapping[str, object]) -> object:
    return _class_with_aux(base)(**values)
