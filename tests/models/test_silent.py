"""Models that pruning would make silently wrong: refused, or given all patches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cropr_kernels as cropr

IMAGES = torch.randn(2, 3, 64, 64)
TOKENS, DIM = 65, 64


class Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.num_heads = 2
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)
        self.bias = nn.Parameter(torch.randn(2, TOKENS, TOKENS))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        count = x.shape[1]
        if self.kind == "rotary":
            q, k = (rotated(part) for part in (q, k))
        if self.kind == "bias":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None])
        elif self.kind == "part of a bias":
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=self.bias[None, :, :count, :count]
            )
        elif self.kind == "bias, written out":
            logits = q @ k.transpose(2, 3) / 32**0.5 + self.bias[:, :count, :count]
            y = logits.softmax(-1) @ v
        elif self.kind == "distances":
            places = torch.arange(count)
            logits = q @ k.transpose(2, 3) / 32**0.5 - (places[:, None] - places).abs()
            y = logits.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal")
        return self.proj(y.transpose(1, 2).flatten(2))


def rotated(x):
    """Turn queries or keys by their index."""
    angles = torch.arange(x.shape[2])[:, None] * torch.linspace(0.1, 1, 16).repeat(2)
    return x * angles.cos() + torch.cat([-x[..., 16:], x[..., :16]], -1) * angles.sin()


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(DIM)
        self.attn = Attention(kind)
        self.positions = nn.Parameter(torch.randn(TOKENS, DIM))
        self.neighbors = nn.Conv1d(DIM, DIM, 3, padding=1)

    def forward(self, x):
        if self.kind == "positions":
            x = x + self.positions[: x.shape[1]]
        elif self.kind == "convolution":
            x = x + self.neighbors(x.transpose(1, 2)).transpose(1, 2)
        elif self.kind == "shift":
            x = x + x.roll(1, 1)
        return x + self.attn(self.norm(x))


class Net(nn.Module):
    """A Vision Transformer with any head, and one block of some kind."""

    def __init__(self, head, kind="", layer=2):
        super().__init__()
        self.img_size = 64
        self.patches = nn.Conv2d(3, DIM, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(torch.randn(1, TOKENS, DIM))
        self.layers = nn.ModuleList(Block(kind if i == layer else "") for i in range(4))
        self.classifier = nn.Linear(DIM, 10)
        self.weights = nn.Parameter(torch.randn(TOKENS, 1))
        self.head = head

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self, x)


def of_class_token(net, x):
    return net.classifier(x[:, 0])


BLOCKS = [
    "rotary", "part of a bias", "bias, written out", "distances", "positions", "convolution",
    "shift",
]  # fmt: skip


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_that_reads_places_from_the_order_of_its_tokens_is_refused(kind, layer):
    model = Net(of_class_token, kind, layer).eval()
    with pytest.raises(TypeError, match=f"block {layer} (reads positions from the order|does not)"):
        cropr.apply(model, rate=8)
    assert not hasattr(model, "cropr")


@pytest.mark.parametrize("kind", ["bias", "causal"])
@torch.no_grad()
def test_kept_tokens_attend_with_the_bias_and_in_the_order_that_they_had(kind):
    model = Net(of_class_token, kind).eval()
    cropr.apply(model, rate=8, num_outputs=0)
    assert model.cropr.spec.has_bias == (kind == "bias")
    entered = {}
    for layer in (2, 3):
        model.layers[layer].register_forward_pre_hook(
            lambda block, args, layer=layer: entered.update({layer: args[0]})
        )
    model(IMAGES)
    left = cropr.pruning_map(model, IMAGES).flatten(1)
    block = cropr.remove(model).layers[2]
    for i in range(2):
        rows, next_rows = (
            torch.cat([torch.tensor([0]), 1 + (left[i] > layer).nonzero()[:, 0]])
            for layer in (2, 3)
        )
        x = entered[2][i : i + 1]
        qkv = block.attn.qkv(block.norm(x)).unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        bias = block.attn.bias[:, rows][:, :, rows]
        y = F.scaled_dot_product_attention(
            *qkv, attn_mask=bias[None] if kind == "bias" else None, is_causal=kind == "causal"
        )
        output = x + block.attn.proj(y.transpose(1, 2).flatten(2))
        expected = output[0, torch.isin(rows, next_rows)]
        torch.testing.assert_close(entered[3][i], expected, rtol=1e-4, atol=1e-4)


READS_PLACES = {
    "a row": lambda net, x: net.classifier(x[:, 6]),
    "class token and a row": lambda net, x: net.classifier(x[:, 0] + x[:, 6]),
    "class token and the last row": lambda net, x: net.classifier(x[:, 0] + x[:, -1]),
    "class token and first rows": lambda net, x: net.classifier(x[:, 0] + x[:, 1:9].mean(1)),
    "every second row": lambda net, x: net.classifier(x[:, 1::2].mean(1)),
    "weights of places": lambda net, x: net.classifier((x * net.weights[: x.shape[1]]).mean(1)),
    "pairs of rows": lambda net, x: net.classifier(x[:, 1::2] + x[:, 2::2]),
    "a row, by a name": lambda net, x: {"scores": net.classifier(x[:, 0] + x[:, 6])},
    "a row, in a tuple": lambda net, x: (net.classifier(x[:, 0]), net.classifier(x[:, 6])),
    "a map": lambda net, x: x[:, 1:].transpose(1, 2).unflatten(2, (8, 8)).mean(3),
    "the number of rows": lambda net, x: net.classifier(x[:, 1:].sum(1)),
    "no other number": lambda net, x: net.classifier((torch.ones(1, TOKENS) @ x)[:, 0]),
}
READS_A_SET = {
    "class token": of_class_token,
    "mean": lambda net, x: net.classifier(x[:, 1:].mean(1)),
    "mean of all": lambda net, x: net.classifier(x.mean(1)),
    "maximum": lambda net, x: net.classifier(x[:, 1:].amax(1)),
    "attention": lambda net, x: net.classifier((x * x[:, :, :1].softmax(1)).sum(1)),
    "tokens": lambda net, x: x,
    "patches, channels first": lambda net, x: x[:, 1:].transpose(1, 2),
    "both": lambda net, x: (net.classifier(x[:, 0]), x),
}


@pytest.mark.parametrize("name", READS_PLACES)
@torch.no_grad()
def test_a_head_that_reads_places_gets_all_patches(name):
    model = Net(READS_PLACES[name]).eval()
    plain = model(IMAGES)
    cropr.apply(model, rate=8, num_outputs=0)
    assert model.cropr.spec.needs_map
    assert model.cropr.config.llf == cropr.Fusion(blocks=0)
    if isinstance(plain, torch.Tensor):
        assert model(IMAGES).shape == plain.shape
        assert torch.equal(cropr.set_rate(model, 0)(IMAGES), plain)


def test_outputs_that_belong_to_no_image_are_refused():
    def one_more(net, x):
        return torch.cat([net.classifier(x[:, 0]), net.classifier(x[:1, 0])])

    with pytest.raises(TypeError, match=r"\d images become \d outputs"):
        cropr.apply(Net(one_more).eval(), rate=8)


@pytest.mark.parametrize("name", READS_A_SET)
@torch.no_grad()
def test_a_head_that_reads_a_set_gets_the_kept_tokens(name):
    model = cropr.apply(Net(READS_A_SET[name]).eval(), rate=8, num_outputs=0)
    assert not model.cropr.spec.needs_map and model.cropr.config.llf is None
