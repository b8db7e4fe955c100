"""Closed-form queries: the regression, every family of models, determinism, errors, real photos."""

import copy
import json

import pytest
import torch
from helpers.models import MODELS, randomize, reference_vit, timm_vit

import cropr_kernels as cropr
from cropr_kernels import query_files
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.importance import AttentionInput, attention_prefix_first, importance
from cropr_kernels.models.blocks import project_heads
from cropr_kernels.models.token_format import TokenFormat
from cropr_kernels.thresholds import Sample
from cropr_kernels.utils import io


def slow_queries(model, images, ridge):
    """Return the queries from all tokens at once, with attention matrices recorded by hooks on the
    reference ViT."""
    outputs, attention = [], []

    def record(block, args, output):
        outputs.append(output[:, model.num_prefix_tokens :].double())

    def look(module, args, kwargs, output):
        q, k, _ = project_heads(module, args[0])
        shares = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        rows = (
            shares[:, :1]
            if model.config.global_pool == "token"
            else shares[:, model.num_prefix_tokens :]
        )
        patches = rows.mean(1)[:, model.num_prefix_tokens :]
        attention.append(patches / patches.sum(1, keepdim=True))

    hooks = [block.register_forward_hook(record) for block in model.blocks]
    hooks += [block.attn.register_forward_hook(look, with_kwargs=True) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    queries = []
    for layer in range(len(model.blocks) - 1):
        target = sum(attention[layer + 1 :]) / len(attention[layer + 1 :])
        ranks = torch.stack(
            [torch.searchsorted(row.sort().values, row) / (row.numel() - 1) for row in target]
        ).double()
        x = outputs[layer] - outputs[layer].mean(1, keepdim=True)
        x, t = x.flatten(0, 1), (ranks - ranks.mean(1, keepdim=True)).flatten()
        a = x.T @ x
        a += ridge * a.diagonal().mean() * torch.eye(a.shape[0], dtype=a.dtype)
        q = torch.linalg.lstsq(a, (x.T @ t)[:, None]).solution[:, 0]
        queries.append(q / q.norm())
    return queries


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 3, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"global_pool": "avg"},
    ],
)
def test_queries_solve_the_ridge_regression(options):
    model = randomize(reference_vit(**options)).eval()
    images = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        expected = slow_queries(model, images, 1e-2)
    cropr.apply(model, rate=8)
    for batches in (images, images.split(4), [(images[:1], "labels"), (images[1:], None)]):
        cropr.calibrate(model, batches, ridge=1e-2, batch_size=4)
        for module, query in zip(model.cropr, expected):
            torch.testing.assert_close(module.query().double(), query, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_calibrates_and_keeps_its_backbone(name):
    model = cropr.apply(randomize(MODELS[name]()), rate=8, llf=True, num_queries=3).train()
    before = {
        key: p.clone() for key, p in model.state_dict().items() if not key.endswith("queries")
    }
    images = torch.randn(4, 3, 64, 64)
    assert cropr.calibrate(model, images) is model and model.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    first = [module.query() for module in model.cropr]
    assert all(query.norm().item() == pytest.approx(1.0, abs=1e-4) for query in first)
    for module in model.cropr:
        module.queries.data.normal_()
    cropr.calibrate(model, images)
    for a, module in zip(first, model.cropr):  # three queries sum to one only up to rounding
        torch.testing.assert_close(a, module.query(), rtol=1e-5, atol=1e-5)
    fast = cropr.calibrate(cropr.deploy(model), images)
    for a, module in zip(first, fast.cropr):
        torch.testing.assert_close(a, module.query(), rtol=1e-5, atol=1e-5)
    assert cropr.set_rate(fast, 4)(images).isfinite().all()


def test_calibration_is_deterministic_and_keeps_the_spread_of_several_queries():
    images = torch.randn(4, 3, 64, 64)
    single, several = (cropr.apply(reference_vit(), rate=8, num_queries=count) for count in (1, 5))
    before = [module.queries.detach().clone() for module in several.cropr]
    queries = []
    for _ in range(2):
        cropr.calibrate(single, images)
        queries.append([module.queries.detach().clone() for module in single.cropr])
    assert all(map(torch.equal, *queries))
    cropr.calibrate(several, images)
    for old, module in zip(before, several.cropr):
        spread = module.queries - module.queries.mean(0)
        torch.testing.assert_close(spread, old - old.mean(0), rtol=1e-4, atol=1e-5)


def test_importance_is_the_share_of_attention():
    query, key = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    for class_token, rows in ((True, slice(0, 1)), (False, slice(2, None))):
        for bias in (None, torch.randn(1, 3, 10, 10), torch.randn(2, 1, 1, 10)):
            logits = query @ key.transpose(-2, -1) / 8**0.5
            logits = logits if bias is None else logits + bias
            full = logits.softmax(-1)[:, :, rows].mean((1, 2))[:, 2:]
            for attention in (AttentionInput(query, key, bias), logits):
                share = importance(attention, 2, class_token=class_token)
                torch.testing.assert_close(share, full / full.sum(1, keepdim=True))


def test_attention_has_the_order_that_pruning_has():
    token_format = TokenFormat((1, 2))  # one token before the patches, two after them
    order = torch.tensor([0, 8, 9, *range(1, 8)])
    query, key = torch.randn(2, 2, 3, 10, 8)
    logits = torch.randn(1, 1, 10, 10)
    expected = logits[:, :, order][..., order]
    assert torch.equal(attention_prefix_first(logits, token_format), expected)
    for bias in (logits, logits[:, :, :1]):
        ordered = attention_prefix_first(AttentionInput(query, key, bias), token_format)
        assert torch.equal(ordered.query, query[:, :, order])
        assert torch.equal(ordered.key, key[:, :, order])
        rows = order if bias.shape[2] == 10 else [0]
        assert torch.equal(ordered.bias, bias[:, :, rows][..., order])


def test_attention_that_is_written_out_gives_the_same_queries():
    queries = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = cropr.apply(randomize(timm_vit()).eval(), rate=8)
        for block in model.blocks:
            block.attn.fused_attn = fused
        cropr.calibrate(model, torch.randn(4, 3, 64, 64))
        queries.append(torch.stack([module.query() for module in model.cropr]))
    torch.testing.assert_close(*queries, rtol=1e-3, atol=1e-4)


def test_unsupported_models_and_illegal_options_raise():
    model = cropr.apply(reference_vit(), rate=8)
    with pytest.raises(ValueError, match="needs at least one image, got none"):
        cropr.calibrate(model, [])
    with pytest.raises(ValueError, match="ridge must be positive, got 0"):
        cropr.calibrate(model, torch.randn(1, 3, 64, 64), ridge=0)
    with pytest.raises(
        TypeError, match=r"cropr.calibrate: the model is not pruned; call cropr.apply"
    ):
        cropr.calibrate(reference_vit(), torch.randn(1, 3, 64, 64))
    other = cropr.apply(
        reference_vit(), rate=8, make_module=lambda layer, block: torch.nn.Identity()
    )
    with pytest.raises(ValueError, match="sets the queries of Cropr modules, got Identity"):
        cropr.calibrate(other, torch.randn(1, 3, 64, 64))
    mute = cropr.apply(timm_vit(), rate=8)
    mute.blocks[0].attn.forward = lambda x, **kwargs: x
    with pytest.raises(ValueError, match=r"block 0 must attend once .*, attended 0 times"):
        cropr.calibrate(mute, torch.randn(1, 3, 64, 64))
    assert mute.training


def test_agreement_is_that_of_the_deployed_model():
    model = cropr.apply(randomize(reference_vit()), rate=8)
    images = torch.randn(10, 3, 64, 64)
    rows = cropr.agreement(model, images, [0, 5, 18], batch_size=4)
    assert [row.rate for row in rows] == [0, 5, 18] and rows[0][1:] == (
        1.0,
        pytest.approx(0, abs=1e-9),
        1.0,
    )
    fast = cropr.deploy(model)
    logits = {rate: cropr.set_rate(fast, rate)(images).double().log_softmax(1) for rate in (0, 18)}
    assert rows[2].agreement == (logits[0].argmax(1) == logits[18].argmax(1)).double().mean()
    expected = torch.nn.functional.kl_div(
        logits[18], logits[0], log_target=True, reduction="batchmean"
    )
    assert rows[2].divergence == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert rows[2].flops > rows[1].flops > 1
    features = cropr.apply(randomize(reference_vit(num_classes=0)), rate=8, num_outputs=0)
    [row] = cropr.agreement(features, images, [18])
    assert 0 < row.agreement < 1 and row.divergence != row.divergence
    row = cropr.calibration.Agreement
    some = [row(4, 0.99, 0.0, 1.1), row(8, 0.96, 0.1, 1.2), row(12, 0.9, 0.2, 1.4)]
    assert (
        cropr.calibration.recommend(some).rate == 8
        and cropr.calibration.recommend(some, 0.999) is None
    )
    with pytest.raises(ValueError, match="agreement: needs at least one image"):
        cropr.agreement(model, [], [4])


def test_thresholds_are_found_on_the_first_photos_of_one_size():
    sample = Sample()
    batches = [torch.rand(count, 3, size, size) for count, size in ((100, 8), (9, 4), (50, 8))]
    for images in [*batches, batches[0]]:
        sample.add(images)
    assert torch.equal(sample.images(), torch.cat([batches[0], batches[2][:28]]))


def test_a_folder_is_no_file_of_queries(tmp_path):
    model = cropr.apply(reference_vit(), rate=4)
    with pytest.raises(ValueError, match="is a folder, not a file of cropr calibrate or"):
        cropr.load_queries(model, tmp_path)


def test_saved_queries_load_and_damaged_files_raise(tmp_path):
    model = cropr.calibrate(cropr.apply(reference_vit(), rate=8), torch.randn(4, 3, 64, 64))
    path = tmp_path / "queries.safetensors"
    cropr.save_queries(model, path, {"rate": 8})
    for other in (
        cropr.apply(reference_vit(), rate=3, llf=True),
        cropr.deploy(cropr.apply(reference_vit(), rate=8)),
    ):
        assert cropr.load_queries(other, path) is other
        for saved_module, module in zip(model.cropr, other.cropr):
            torch.testing.assert_close(module.query(), saved_module.query())
    narrow = cropr.apply(reference_vit(embed_dim=32), rate=8)
    with pytest.raises(ValueError, match=r"3 modules of width 32, .* queries of shape \(3, 64\)"):
        cropr.load_queries(narrow, path)
    intact = path.read_bytes()
    for position in range(0, len(intact), 7):
        path.write_bytes(
            intact[:position]
            + bytes([intact[position] ^ 1 << position % 8])
            + intact[position + 1 :]
        )
        try:
            cropr.load_queries(cropr.apply(reference_vit(), rate=8, num_outputs=0), path)
        except ValueError:
            continue
        changed = io.load_safetensors(path)  # a bit without effect, as in an unused name
        assert torch.equal(
            changed[0]["queries"], torch.stack([module.query() for module in model.cropr])
        )
    for queries, message in (
        (
            torch.full((3, 64), float("nan")),
            r"must be finite, float32 and \(modules, D\), .* torch.float32 \(3, 64\)",
        ),
        (torch.ones(3, 64, dtype=torch.int64), "holds torch.int64"),
        (torch.ones(64), r"holds torch.float32 \(64,\)"),
    ):
        metadata = {"about": "{}", "sha256": query_files._checksum(queries, "{}")}
        pytest.importorskip("safetensors.torch").save_file({"queries": queries}, path, metadata)
        with pytest.raises(ValueError, match=message):
            cropr.load_queries(model, path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no queries"):
        cropr.load_queries(model, path)
    with pytest.raises(FileNotFoundError):
        cropr.load_queries(model, tmp_path / "none.pt")


def test_saved_queries_load_bit_for_bit(tmp_path):
    model = cropr.apply(reference_vit(), rate=8, num_outputs=0)
    cropr.save_queries(model, tmp_path / "queries.safetensors")
    other = cropr.load_queries(
        cropr.apply(reference_vit(), rate=8, num_outputs=0), tmp_path / "queries.safetensors"
    )
    assert all(torch.equal(a.query(), b.query()) for a, b in zip(model.cropr, other.cropr))


def test_the_command_calibrates_a_folder_and_recommends(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    weights, photos = tmp_path / "model.pt", tmp_path / "photos" / "some"
    model = randomize(cropr.create_vit("vit_tiny_patch16_224", num_classes=5))
    torch.save(model.state_dict(), weights)
    photos.mkdir(parents=True)
    for i in range(9):
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(photos / f"{i}.jpg")
    (photos / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "queries.safetensors"
    arguments = [
        "calibrate",
        str(weights),
        str(tmp_path),
        "--out",
        str(out),
        "--quiet",
        "--rates",
        "1",
        "17",
    ]
    assert cli.main([*arguments, "--least", "0"]) == 0
    text = capsys.readouterr().out
    assert "recommended: rate 17" in text and "1 unreadable" in text
    tensors, metadata = io.load_safetensors(out)
    stored = json.loads(metadata["about"])
    assert (
        tensors["queries"].shape == (11, 192)
        and stored["rate"] == 17
        and len(stored["report"]) == 2
    )
    assert (
        cli.main([*arguments, "--least", "100.1"]) == 0
        and "no rate agrees" in capsys.readouterr().out
    )
    cropr.load_queries(cropr.apply(model, rate=stored["rate"]), out)
    for bad, message in [
        (["calibrate", str(weights), str(tmp_path / "nowhere")], "must hold at least 2 photos"),
        (
            ["calibrate", "no_model", str(tmp_path)],
            "a model must be a preset of cropr_kernels, a model of timm",
        ),
        (["calibrate", str(tmp_path / "no.pt"), str(tmp_path)], "no weight file at"),
    ]:
        assert cli.main(bad) == 1 and message in capsys.readouterr().err


@pytest.mark.slow
def test_calibrated_model_agrees_more_with_the_unpruned_one_on_real_photos(data):
    from helpers.photos import read_photos

    from cropr_kernels.models.factory import load_weights

    model, _ = load_weights(data / "vit_tiny_p16_224_tin200_fp16.safetensors")
    images, _ = read_photos(data, 100)
    with torch.inference_mode():
        expected = model.eval()(images[50:]).argmax(1)
    calibrated = cropr.calibrate(cropr.apply(copy.deepcopy(model), rate=12), images[:50])
    arbitrary = cropr.apply(model, rate=12)
    with torch.inference_mode():
        agreement = [
            (cropr.deploy(m)(images[50:]).argmax(1) == expected).sum().item()
            for m in (calibrated, arbitrary)
        ]
    assert agreement[0] > agreement[1] + 3 and agreement[0] >= 35


@pytest.mark.slow
def test_queries_do_not_depend_on_the_number_of_threads():
    """Regression: MKL's batched solver failed after the number of threads was set."""
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = cropr.apply(cropr.create_vit("vit_tiny_patch16_224").eval(), rate=8, num_outputs=0)
    threads, queries = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            queries.append(
                torch.stack(
                    [module.query() for module in cropr.calibrate(model, images).cropr]
                ).clone()
            )
    finally:
        torch.set_num_threads(threads)
    for other in queries[1:]:
        torch.testing.assert_close(other, queries[0], rtol=1e-3, atol=1e-3)


def test_a_ridge_that_is_too_weak_is_raised_with_a_warning():
    model = cropr.apply(reference_vit(embed_dim=192), rate=8, num_outputs=0).eval()
    with pytest.warns(UserWarning, match=r"cropr.calibrate: block \d needed a ridge of 1e-"):
        cropr.calibrate(
            model, torch.randn(1, 3, 64, 64)[:, :, :16, :16].repeat(1, 1, 4, 4), ridge=1e-24
        )
    assert all(module.query().isfinite().all() for module in model.cropr)
    with pytest.raises(ValueError, match="the tokens after block 0 are not finite"):
        cropr.calibrate(model, torch.full((1, 3, 64, 64), float("nan")))
