"""A plugin of vLLM, out of its tree: Qwen2.5-VL with fewer image tokens. Untried: no vLLM was at
hand; written against its documented interface of September 2026.

    pip install --no-build-isolation examples/vllm
    CROPR_KEEP=0.5 CROPR_QUERY=query.pt vllm serve FOLDER --video-pruning-rate 0.01

CROPR_KEEP is `keep` of `cropr.prune_image_tokens`, CROPR_QUERY a file of
torch.save(model.cropr_image_tokens.query, ...). vLLM recomputes 3-D positions only if
--video-pruning-rate is above 0; that rate is of videos.
"""

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"


def register() -> None:
    """Take the place of Qwen2.5-VL in this process: vLLM calls it in each of its own."""
    from vllm import ModelRegistry

    # By name: importing the model here could initialize CUDA before a fork.
    ModelRegistry.register_model(ARCHITECTURE, f"cropr_vllm.model:Pruned{ARCHITECTURE}")
