"""Features of all patches, which dense tasks read."""

import pytest
import torch
from helpers.models import randomize, reference_vit, timm_model, timm_vit

import cropr_kernels as cropr
from cropr_kernels.tasks.features import patch_features

MODELS = {
    "token": reference_vit,
    "average": lambda: reference_vit(global_pool="avg"),
    "average, RMSNorm": lambda: timm_model("test_vit4"),
    "average, norm before it": lambda: timm_vit(global_pool="avg", fc_norm=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_patches_have_the_last_norm_of_the_tokens_also_if_it_is_after_the_pooling(name):
    model = randomize(MODELS[name]()).eval()
    images = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    expected = model.fc_norm(tokens)  # the identity if the tokens are normed before the pooling
    for backbone in (model, cropr.deploy(cropr.apply(model, rate=0, llf=True))):
        torch.testing.assert_close(
            patch_features(backbone, images, predict=False)[0], expected, rtol=1e-4, atol=1e-5
        )
