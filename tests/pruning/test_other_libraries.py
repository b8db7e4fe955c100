"""Models that no adapter names: code of the hubs, tokens in other formats, and what their blocks
take."""

import pytest
import torch
from helpers.hub import HUB, HubDino
from helpers.models import hf, randomize
from torch import nn

import cropr_kernels as cropr
from benchmarks.models.supported import check
from cropr_kernels.models.token_format import TokenFormat

ENGINE = {"DINOv3 of the hub": "block 0: its blocks take a mask, or a table by another name"}
FORMATS = {
    "plain": TokenFormat(),
    "tokens last": TokenFormat((1, 2)),
    "sequence first": TokenFormat(sequence_first=True),
    "all": TokenFormat((3, 1), sequence_first=True, in_list=True),
}


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("name", HUB)
def test_models_of_hubs_drop_merge_calibrate_and_deploy(name):
    torch.manual_seed(0)
    verdict = check(randomize(HUB[name]().eval()))
    assert verdict == (True, "", ENGINE.get(name, "yes"), "yes", "yes", "yes")


@pytest.mark.parametrize("name", ["DINOv2 of the hub", "DINOv3 of the hub"])
@torch.no_grad()
def test_intermediate_layers_have_all_patches(name, images):
    model = randomize(HUB[name]().eval())
    plain = model.get_intermediate_layers(images, 4)
    cropr.apply(model, rate=0, num_outputs=0)
    for x, expected in zip(model.get_intermediate_layers(images, 4), plain, strict=True):
        assert torch.equal(x, expected)
    cropr.set_rate(model, 8)
    lives = cropr.pruning_map(model, images).flatten(1)
    for runner in (model, cropr.deploy(model)):
        maps = runner.get_intermediate_layers(images, 4)
        assert all(x.shape == plain[0].shape for x in maps)
        assert torch.equal(maps[0], plain[0])  # before anything is pruned
    model.norm.register_forward_hook(lambda norm, args, output: seen.append(output))
    seen = []
    model(images)  # the tokens kept
    first = model.cropr.spec.num_prefix
    for b in range(2):
        kept = maps[-1][b][lives[b] == len(model.blocks)]
        torch.testing.assert_close(seen[0][b, first:], kept, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_backbone_whose_map_is_reshaped_without_an_error_gets_all_tokens(images):
    model = randomize(hf("Dinov2Backbone", "Dinov2Config").eval())
    (plain,) = model(images).feature_maps
    assert model.config.hidden_size == 64  # as many as patches: a reshape of 57 tokens succeeds
    cropr.apply(model, rate=2, num_outputs=0)
    assert model.cropr.spec.needs_map
    (pruned,) = model(images).feature_maps
    assert pruned.shape == plain.shape and not torch.equal(pruned, plain)
    assert torch.equal(cropr.set_rate(model, 0)(images).feature_maps[0], plain)


@pytest.mark.parametrize("token_format", FORMATS.values(), ids=FORMATS)
def test_a_token_format_decodes_what_it_encodes(token_format):
    x = torch.randn(3, 9, 4)
    like = [x] if token_format.in_list else x
    encoded = token_format.encode(x, like)
    assert type(encoded) is type(like)
    assert torch.equal(token_format.decode(encoded), x)
    in_row = token_format.encode(x, (like, None), in_row=True)
    assert isinstance(in_row, tuple) and in_row[1] is None and in_row[0].shape.numel() == x.numel()
    assert torch.equal(token_format.decode(in_row, 3), x)
    # Each token of the model is where it says
    places = token_format.in_place(torch.arange(9).expand(3, -1))
    positions = torch.arange(9).expand(3, -1)
    got = token_format.positions_in_place(positions, 9)
    assert torch.equal(token_format.prefix_first(places), positions)
    assert torch.equal(got, positions)


def test_positions_of_a_suffix_are_those_of_the_model():
    token_format = TokenFormat((1, 1))  # one token before the patches, one after them
    positions = torch.tensor([[0, 1, 3, 5]])  # of 6: the patches are at 1 to 4 of the model
    assert token_format.positions_in_place(positions, 6).tolist() == [[0, 2, 4, 5]]


class Mixing(nn.Module):
    """A block that adds the mean of its batch: images are not apart."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return x + self.layer(x) + x.mean(0, keepdim=True)


class Shifting(Mixing):
    """A block that reads positions from the order of its tokens."""

    def forward(self, x):
        return x + self.layer(x) + torch.arange(x.shape[1])[:, None] / 10


class Summing(Mixing):
    """A block that sees no token before its own: causal, without attention."""

    def forward(self, x):
        return x + self.layer(x.cumsum(1))


class Padding(Mixing):
    """A block that returns as many tokens, whatever it is given."""

    def forward(self, x):
        x = x + self.layer(x)
        return nn.functional.pad(x, (0, 0, 0, 65 - x.shape[1]))


class Naming(Mixing):
    """A block that returns its tokens by name."""

    def forward(self, x):
        return {"tokens": x + self.layer(x)}


class Named(HubDino):
    def run_blocks(self, images):
        x = self.prepare_tokens_with_masks(images)
        for block in self.blocks:
            x = block(x)["tokens"]
            yield x


class Blind(HubDino):
    """Its first tokens do not depend on the image."""

    def prepare_tokens_with_masks(self, images):
        return 0 * super().prepare_tokens_with_masks(images)


class Between(HubDino):
    """A token stands between its patches."""

    def prepare_tokens_with_masks(self, images):
        return super().prepare_tokens_with_masks(images).roll(9, 1)


class Flattened(nn.Module):
    """Patches by a linear layer, not by a convolution."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 64)

    def forward(self, images):
        return self.layer(nn.functional.unfold(images, 8, stride=8).transpose(1, 2))


@pytest.mark.parametrize(
    ("tower", "block", "reason"),
    [
        (HubDino, Padding, r"block 0 returns \(2, 65, 64\) for tokens \(2, 33, 64\)"),
        (Named, Naming, "no two blocks are called one after the other, each with the tokens"),
        (Blind, None, "no token that enters the first block depends on the image"),
        (Between, None, "tokens that are no patches stand between these"),
    ],
)
def test_tokens_that_are_no_rows_of_patches_are_refused(tower, block, reason):
    model = tower(lists=False).eval()
    if block is not None:
        model.blocks = nn.ModuleList(block() for _ in range(4))
    with pytest.raises(TypeError, match=reason):
        cropr.apply(model, rate=8)


@pytest.mark.parametrize("size", [64, (64, 64), (3, 64, 64), {"height": 64, "width": 64}])
def test_the_size_of_images_is_found_in_every_form(size):
    model = HubDino(lists=False).eval()
    model.img_size = size
    assert cropr.apply(model, rate=8).cropr.spec.grid == (8, 8)


def test_a_grid_of_meta_tensors_needs_a_convolution():
    with torch.device("meta"):
        model = HubDino(lists=False).eval()
        images = torch.zeros(1, 3, 64, 64)
        assert cropr.find_spec(model, images).num_prefix == 1
        model.patch_embed = Flattened()
    with pytest.raises(TypeError, match="on the meta device, and no convolution shows its grid"):
        cropr.find_spec(model, images)


@pytest.mark.parametrize("block", [Mixing, Shifting, Summing])
def test_blocks_that_are_no_functions_of_a_set_are_refused(block):
    model = HubDino(lists=False).eval()
    model.blocks = nn.ModuleList(block() for _ in range(4))
    reason = "reads positions from the order of its tokens, or other images of the batch"
    with pytest.raises(TypeError, match=reason):
        cropr.apply(model, rate=8)
