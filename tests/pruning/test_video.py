"""Videos and spectrograms: maps and masks over frames, and pictures of them."""

import pytest
import torch
from helpers.extras import require
from helpers.models import HF, randomize, transformers
from torch import nn

import cropr_kernels as cropr
from cropr_kernels.utils import viz

TUBELETS, SIDE = 2, 8  # of two frames each


def video_mae():
    t = transformers()
    return t.VideoMAEForVideoClassification(t.VideoMAEConfig(**HF, num_frames=4))


def vivit():
    t = transformers()
    config = t.VivitConfig(**HF, num_frames=4, tubelet_size=[2, 8, 8])
    return t.VivitForVideoClassification(config)


def spectrogram_transformer():
    t = transformers()
    return t.ASTForAudioClassification(t.ASTConfig(**HF, num_mel_bins=32, max_length=64))


@pytest.fixture(params=[video_mae, vivit])
def model(request):
    torch.manual_seed(0)
    return randomize(request.param()).eval()


@pytest.fixture
def videos():
    return torch.randn(2, 4, 3, 64, 64)


def first_tokens(model, images):
    """Return the tokens that enter the first block, without the prefix."""
    spec, entered = cropr.find_spec(model), []
    handle = spec.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model(images)
    handle.remove()
    return entered[0][:, spec.num_prefix :]


@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_maps_of_videos_have_a_frame_a_tubelet(model, videos, deployed):
    changed = videos.clone()
    changed[:, 2:, :, 56:, :8] += 1  # of the last tubelet, the patch at the bottom left
    tokens = [first_tokens(model, batch) for batch in (videos, changed)]
    differs = (tokens[0] != tokens[1]).any(2).view(2, TUBELETS, SIDE, SIDE)
    assert differs.nonzero().tolist() == [[0, 1, 7, 0], [1, 1, 7, 0]]

    cropr.apply(model, rate=8, merge=True, num_outputs=0)
    cropr.calibrate(model, videos)
    runner = cropr.deploy(model) if deployed else model
    maps, merged = cropr.pruning_map(runner, videos), cropr.merge_map(runner, videos)
    assert maps.shape == merged.shape == (2, TUBELETS, SIDE, SIDE)
    for video, tokens_of_video in zip(maps, merged):
        kept = int((video == 4).sum())
        # The class token of ViViT makes one more go; deployed, each video keeps what it needs
        assert 80 < kept < 128 if deployed else kept in (103, 104)
        assert tokens_of_video.unique().tolist() == list(range(kept))
        # Kept patches count in order of position, frame after frame
        assert torch.equal(tokens_of_video[video == 4], torch.arange(kept))

    protect = torch.zeros(2, TUBELETS, SIDE, SIDE, dtype=torch.bool)
    protect[0, 1], protect[1, 0] = True, True
    maps = cropr.pruning_map(runner, videos, protect=protect)
    assert (maps[protect] == 4).all() and (maps[~protect] < 4).sum() in (2 * 24, 2 * 25)


@torch.no_grad()
def test_masks_of_videos_have_frames(model, videos):
    cropr.apply(model, rate=4, num_outputs=0)
    protect = torch.zeros(2, TUBELETS * SIDE, SIDE, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(B, frames, grid height, grid width\) with B = 2 and"):
        model(videos, protect=protect)
    plain = model(videos).logits
    assert torch.equal(model(videos, protect=protect.view(2, TUBELETS, SIDE, SIDE)).logits, plain)


class AnyVideo(nn.Module):
    """A video transformer without positions."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv3d(3, 64, (2, 8, 8), (2, 8, 8))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, norm_first=True)
            for _ in range(4)
        )

    def forward(self, videos):
        x = self.patches(videos.transpose(1, 2)).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


@torch.no_grad()
def test_videos_of_other_sizes_and_lengths_have_maps_too(videos):
    model = randomize(AnyVideo()).eval()
    spec = cropr.find_spec(model, videos)
    assert (spec.frames, spec.grid) == (TUBELETS, (TUBELETS * SIDE, SIDE))
    cropr.apply(model, rate=4, num_outputs=0, spec=spec)
    for shape in ((4, 3, 64, 96), (6, 3, 64, 64), (8, 3, 32, 64), (4, 3, 64, 64)):
        frames, _, height, width = shape
        maps = cropr.pruning_map(model, torch.randn(2, *shape))
        assert maps.shape == (2, frames // 2, height // 8, width // 8)


@torch.no_grad()
def test_maps_of_spectrograms_have_frequencies_and_times():
    model, sounds = randomize(spectrogram_transformer()).eval(), torch.randn(2, 64, 32)
    later = sounds.clone()
    later[:, 56:, :8] += 1  # the end of the lowest frequencies
    tokens = [first_tokens(model, batch) for batch in (sounds, later)]
    differs = (tokens[0] != tokens[1]).any(2).view(2, 3, 6)  # patches begin every 10 cells
    assert differs[0].nonzero().tolist() == [[0, 5]]
    cropr.apply(model, rate=3, merge=True, num_outputs=0)
    assert cropr.pruning_map(model, sounds).shape == (2, 3, 6)
    assert cropr.merge_map(model, sounds).shape == (2, 3, 6)


def colors(path, size):
    """Return the pixels of a picture below its caption."""
    require("PIL")
    from PIL import Image

    with Image.open(path) as picture:
        assert picture.size == (size[1], size[0] + viz.CAPTION)
        return [
            [picture.getpixel((column, viz.CAPTION + row))[0] for column in range(size[1])]
            for row in range(size[0])
        ]


def test_frames_are_drawn_beside_each_other(tmp_path):
    # Two tubelets of two frames, which are black and half gray: drawn are the first of each
    video = torch.tensor([0.0, 1.0, 0.5, 1.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    pruned_after = torch.tensor([[[2, 1], [2, 2]], [[2, 2], [1, 2]]])
    viz.save_pruning_frames(tmp_path / "a.gif", tmp_path / "a.png", video, pruned_after, depth=2)
    pixels = colors(tmp_path / "a.png", (2, 8))  # two blocks of two frames
    assert [row[:4] for row in pixels] == [[0, 0, 128, 128]] * 2
    assert pixels[0][4:] == [0, 217, 128, 128] and pixels[1][4:] == [0, 0, 236, 128]


def test_time_of_a_spectrogram_runs_from_left_to_right(tmp_path):
    sound = torch.tensor([[0.0, 0.2], [0.4, 0.6], [0.8, 1.0]])  # three times, two frequencies
    pruned_after = torch.tensor([[2, 2, 2], [2, 2, 2]])
    viz.save_pruning_frames(tmp_path / "a.gif", tmp_path / "a.png", sound, pruned_after, depth=2)
    pixels = colors(tmp_path / "a.png", (2, 6))
    assert [row[:3] for row in pixels] == [[0, 102, 204], [51, 153, 255]]


def test_sheets_of_videos_and_spectrograms_have_a_strip_each(tmp_path):
    require("matplotlib")
    maps = torch.randint(1, 5, (2, TUBELETS, 2, 2))
    sheets = []
    for name, images, grids in (
        ("videos", torch.rand(2, 4, 3, 8, 8), maps),
        ("photos", torch.rand(2, 3, 8, 8), maps[:, 0]),
        ("sounds", torch.rand(2, 8, 4), maps[:, 0, :1]),
    ):
        for save in (viz.save_pruning_maps, viz.save_merge_maps):
            path = tmp_path / f"{name}_{save.__name__}.png"
            save(path, images, grids, *([4] if save is viz.save_pruning_maps else []))
            sheets.append((name, width_of(path)))
    widths = dict(sheets)
    assert widths["videos"] == 2 * widths["photos"] == widths["sounds"]


def width_of(path):
    from PIL import Image

    with Image.open(path) as picture:
        return picture.width
