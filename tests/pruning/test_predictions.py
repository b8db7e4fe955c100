"""Auxiliary predictions in training: in the outputs of Hugging Face models, and in what Trainer
makes of them."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.models import BLOCK_RUNNERS, HF, randomize, transformers
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

import cropr_kernels as cropr

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
LABELS = torch.tensor([1, 4])


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def vit(**options):
    config = transformers().ViTConfig(**HF, num_labels=5, hidden_dropout_prob=0.0)
    return cropr.apply(
        randomize(transformers().ViTForImageClassification(config)), rate=8, **options
    ).train()


def summed(criterion, output, aux):
    return criterion(output, LABELS) + sum(
        criterion(prediction.mean(1), LABELS) for prediction in aux
    )


def test_with_labels_the_loss_holds_the_auxiliary_losses(images):
    model = vit(num_queries=2)
    output = model(images, labels=LABELS)
    expected = summed(cross_entropy, output.logits, output.aux)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output[0], expected)
    output.loss.backward()
    assert all(module.queries.grad.abs().sum() > 0 for module in model.cropr)
    torch.testing.assert_close(
        model.eval()(images, labels=LABELS).loss, cross_entropy(output.logits, LABELS)
    )


@pytest.mark.each_choice
@pytest.mark.parametrize("labels", [None, LABELS], ids=["", "labels"])
@pytest.mark.parametrize("name", [name for name in BLOCK_RUNNERS if name != "torchvision"])
def test_the_output_keeps_its_class_and_holds_the_predictions(name, labels, images):
    model = randomize(BLOCK_RUNNERS[name]()).eval()
    arguments = {} if labels is None or not hasattr(model, "classifier") else {"labels": labels}
    plain = model(images, **arguments)
    cropr.apply(model, rate=8, num_outputs=5).train()
    torch.manual_seed(0)
    output = model(images, **arguments)
    assert isinstance(output, type(plain)) and list(output) == [*plain, "aux"]
    assert {value.shape for value in output.aux} == {(2, 5)} and len(output.aux) == len(model.cropr)
    torch.manual_seed(0)
    values = model(images, **arguments, return_dict=False)
    assert type(values) is tuple and len(values) == len(output)
    for value, expected in zip(pytree.tree_leaves(values), pytree.tree_leaves(output)):
        assert torch.equal(value, expected)
    assert type(model.eval()(images, **arguments)) is type(plain)


def test_losses_of_models_without_labels_stay(images):
    t = transformers()
    model = t.ViTForMaskedImageModeling(t.ViTConfig(**HF, encoder_stride=8))
    cropr.apply(model, rate=2, llf=True, num_outputs=5).train()
    output = model(images, bool_masked_pos=torch.rand(2, 64) > 0.5)
    assert output.loss.isfinite() and len(output.aux) == 2


def test_outputs_are_taken_apart_and_joined_pickled_and_copied(images):
    output = vit()(images, labels=LABELS)
    leaves, structure = pytree.tree_flatten(output)
    for other in (
        pytree.tree_unflatten(leaves, structure),
        pickle.loads(pickle.dumps(output)),
        copy.copy(output),
        type(output)((name, value) for name, value in output.items()),  # as nn.DataParallel
        type(output)(dict(output)),  # as accelerate
    ):
        assert type(other) is type(output) and list(other) == ["loss", "logits", "aux"]
        assert torch.equal(other.aux[2], output.aux[2])


def test_training_compiles_to_one_graph(images):
    model = vit()
    expected = model(images, labels=LABELS)
    torch._dynamo.reset()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(images, labels=LABELS)
    assert type(output) is type(expected)
    torch.testing.assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("find_unused_parameters", [True, False])  # Trainer sets True
def test_ddp_gives_output_and_gradients_of_the_model(find_unused_parameters, images):
    model = vit()
    expected = model(images, labels=LABELS)
    expected.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shared = nn.parallel.DistributedDataParallel(
            model, find_unused_parameters=find_unused_parameters
        )
        for _ in range(2):
            model.zero_grad()
            output = shared(images, labels=LABELS)
            output.loss.backward()
        assert type(output) is type(expected) and torch.equal(output.aux[0], expected.aux[0])
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, grads[name])
    finally:
        dist.destroy_process_group()


def trained(folder, model, batch_size=2, trainer_class=None, loss=None, **options):
    """Return a copy of the model after two steps of Trainer on four images each."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    t = transformers()
    generator = torch.Generator().manual_seed(0)
    data = [
        {"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": i % 5}
        for i in range(8)
    ]
    arguments = t.TrainingArguments(
        str(folder), per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=4 // batch_size, max_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", optim="sgd",
        learning_rate=0.1, **options,
    )  # fmt: skip
    trainer = (trainer_class or t.Trainer)(
        copy.deepcopy(model),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_loss_func=loss,
    )
    assert trainer.train().training_loss > 0 and trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(data).predictions.shape == (8, 5)
    return trainer.model


def learned(model, other):
    """Tell whether the weights, and whether the queries, of two models differ."""
    changed = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, other.get_parameter(name))
    }
    return "classifier.weight" in changed, all(
        f"cropr.{layer}.queries" in changed for layer in range(3)
    )


def test_the_trainer_trains_alike_in_accumulated_parts(tmp_path):
    model = vit()
    at_once, in_parts = trained(tmp_path, model, 4), trained(tmp_path, model, 1)
    assert learned(model, at_once) == (True, True)
    for expected, parameter in zip(at_once.parameters(), in_parts.parameters()):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)


def smooth(output, labels, num_items_in_batch=None):
    """The loss with label smoothing, of output and auxiliary predictions."""
    return cropr.loss(
        partial(cross_entropy, label_smoothing=0.1),
        output.logits,
        getattr(output, "aux", []),
        labels,
    )


def test_trainers_with_losses_of_their_own_train(tmp_path):
    class Mine(transformers().Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = smooth(outputs, labels)
            return (loss, outputs) if return_outputs else loss

    model = vit()
    assert learned(model, trained(tmp_path, model, trainer_class=Mine)) == (True, True)
    assert learned(model, trained(tmp_path, model, loss=smooth)) == (True, True)


def test_label_smoothing_of_the_trainer_alone_leaves_the_queries(tmp_path):
    model = vit()
    assert learned(model, trained(tmp_path, model, label_smoothing_factor=0.1)) == (True, False)
