"""The pruned ViT against an independent, slow implementation of the paper: one image, one token at
a time."""

import math

import pytest
import torch

import cropr_kernels as cropr
from cropr_kernels.models.vit import ViT, ViTConfig

DEPTH, RATE = 5, 3
COMMON = dict(img_size=24, patch_size=4, embed_dim=32, depth=DEPTH, num_heads=2, num_classes=7)
FAMILIES = {
    "class token": {},
    "class token, registers": dict(reg_tokens=2, no_embed_class=True, init_values=0.5),
    "average pool, no class token": dict(class_token=False, global_pool="avg"),
    "rotary, class token": dict(
        rope=True, rope_ref_grid=4, swiglu=True, qkv="joint_eva", global_pool="avg"
    ),
    "rotary, no class token": dict(
        rope=True, swiglu=True, scale_mlp=True, qkv="split", class_token=False, global_pool="avg"
    ),
}


def norm(x, state, name):
    centred = x - x.mean()
    return (
        centred / math.sqrt(centred.square().mean() + 1e-6) * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def linear(x, state, name):
    return state[f"{name}.weight"] @ x + state.get(f"{name}.bias", 0.0)


def turn(vector, position, config):
    """Return a head's vector, rotated by angles of the patch's row (first half) and column (second
    half)."""
    side, head_dim = config.img_size // config.patch_size, vector.shape[0]
    out, bands = vector.clone(), head_dim // 4
    for pair in range(head_dim // 2):
        coordinate = (position // side, position % side)[pair // bands]
        if config.rope_ref_grid:
            coordinate = coordinate / side * config.rope_ref_grid
        angle = coordinate / 10000 ** ((pair % bands) / bands)
        a, b = vector[2 * pair], vector[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def project(x, state, name, config):
    dim = config.embed_dim
    if config.qkv == "split":
        return [linear(x, state, f"{name}.{part}_proj") for part in "qkv"]
    bias = state.get(f"{name}.qkv.bias")
    if config.qkv == "joint_eva":
        bias = torch.cat([state[f"{name}.q_bias"], torch.zeros(dim), state[f"{name}.v_bias"]])
    return list((state[f"{name}.qkv.weight"] @ x + bias).split(dim))


def attention(tokens, positions, state, name, config):
    """Return the attention output of a list of vectors; a position is a patch, or None for prefix
    tokens."""
    head_dim = config.embed_dim // config.num_heads
    projected = [project(token, state, name, config) for token in tokens]
    outputs = [[] for _ in tokens]
    for head in range(config.num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        queries, keys, values = ([p[i][part] for p in projected] for i in range(3))
        if config.rope:
            queries, keys = (
                [v if pos is None else turn(v, pos, config) for v, pos in zip(side, positions)]
                for side in (queries, keys)
            )
        for i, query in enumerate(queries):
            weights = torch.stack([query @ key / math.sqrt(head_dim) for key in keys]).softmax(0)
            outputs[i].append(sum(weight * value for weight, value in zip(weights, values)))
    return [linear(torch.cat(heads), state, f"{name}.proj") for heads in outputs]


def mlp(x, state, name, config):
    if config.swiglu and config.scale_mlp:
        gate, value = linear(x, state, f"{name}.fc1_g"), linear(x, state, f"{name}.fc1_x")
        hidden = norm(gate * torch.sigmoid(gate) * value, state, f"{name}.norm")
    elif config.swiglu:
        gate, value = linear(x, state, f"{name}.fc1").chunk(2)
        hidden = gate * torch.sigmoid(gate) * value
    else:
        hidden = linear(x, state, f"{name}.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return linear(hidden, state, f"{name}.fc2")


def block(tokens, positions, state, layer, config):
    name = f"blocks.{layer}"
    attended = attention(
        [norm(t, state, f"{name}.norm1") for t in tokens], positions, state, f"{name}.attn", config
    )
    scale1 = state.get(f"{name}.ls1.gamma", 1.0)
    tokens = [t + scale1 * a for t, a in zip(tokens, attended)]
    scale2 = state.get(f"{name}.ls2.gamma", 1.0)
    return [
        t + scale2 * mlp(norm(t, state, f"{name}.norm2"), state, f"{name}.mlp", config)
        for t in tokens
    ]


def parent_of(token, others):
    """Return the position of the row most similar to a token, of [(position, row)]."""
    return max(
        others,
        key=lambda other: torch.nn.functional.cosine_similarity(token, other[1], dim=0).item(),
    )[0]


def restored(departures, alive):
    """Return rows by position; from the last pruning to the first: the token + (its parent now -
    its parent then)."""
    rows = dict(alive)
    for left, then, parents in reversed(departures):
        for position, row in left.items():
            parent = parents[position]
            rows[position] = row if parent is None else row + (rows[parent] - then[parent])
    return rows


def slow_cropr(image, state, queries, config, fusion):
    """Run the method on one image; return the logits and the positions kept after each module."""
    patch, side = config.patch_size, config.img_size // config.patch_size
    tokens, positions = [], []
    for index in range(side * side):
        row, column = index // side * patch, index % side * patch
        window = image[:, row : row + patch, column : column + patch]
        projected = (state["patch_embed.proj.weight"] * window).flatten(1).sum(1) + state[
            "patch_embed.proj.bias"
        ]
        tokens.append(projected)
        positions.append(index)
    prefix = [
        state[name][0, i]
        for name in ("cls_token", "reg_token")
        if name in state
        for i in range(state[name].shape[1])
    ]
    num_prefix, table = len(prefix), state["pos_embed"][0]
    if config.no_embed_class:
        tokens = prefix + [t + p for t, p in zip(tokens, table)]
    else:
        tokens = [t + p for t, p in zip(prefix + tokens, table)]
    positions = [None] * num_prefix + positions

    everywhere, order, departures, kept_positions = positions, list(range(len(tokens))), [], []
    full_blocks = fusion.blocks if fusion else 0
    modules = DEPTH - 1 - full_blocks
    for layer in range(DEPTH):
        if layer == DEPTH - full_blocks:
            rows = restored(departures, zip(order, tokens))
            order, positions = list(range(len(rows))), everywhere
            tokens = [rows[position] for position in order]
        tokens = block(tokens, positions, state, layer, config)
        if layer >= modules:
            continue
        drop = RATE + (num_prefix % 4 if layer == 0 else 0)
        score = [sum(float(q.double() @ t.double()) for q in queries[layer]) for t in tokens]
        candidates = sorted(range(num_prefix, len(tokens)), key=lambda i: (score[i], -i))
        leaving = set(candidates[:drop])
        stay = [i for i in range(len(tokens)) if i not in leaving]
        left, then = ({order[i]: tokens[i] for i in part} for part in (leaving, stay))
        patches = [(order[i], tokens[i]) for i in stay if i >= num_prefix]
        tracks = fusion is not None and fusion.restore == "track_parent"
        parents = {
            position: parent_of(row, patches) if tracks else None for position, row in left.items()
        }
        departures.append((left, then, parents))
        order, tokens, positions = ([part[i] for i in stay] for part in (order, tokens, positions))
        kept_positions.append(order)
    if fusion is not None and full_blocks == 0:
        rows = restored(departures, zip(order, tokens))
        tokens = [rows[position] for position in range(len(rows))]
    if "norm.weight" in state:
        tokens = [norm(t, state, "norm") for t in tokens]
    pooled = (
        tokens[0]
        if config.global_pool == "token"
        else sum(tokens[num_prefix:]) / (len(tokens) - num_prefix)
    )
    if "fc_norm.weight" in state:
        pooled = norm(pooled, state, "fc_norm")
    return linear(pooled, state, "head"), kept_positions


@pytest.mark.each_choice
@torch.no_grad()
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize(
    "llf",
    [
        None,
        cropr.Fusion("as_pruned"),
        cropr.Fusion("track_parent"),
        cropr.Fusion("track_parent", 2),
        cropr.Fusion(blocks=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_a_slow_implementation_of_the_paper(family, llf, num_queries):
    config = ViTConfig(**COMMON, **FAMILIES[family])
    model = ViT(config).eval()
    for parameter in model.parameters():  # none at its neutral value
        parameter.add_(0.1 * torch.randn_like(parameter))
    cropr.apply(model, rate=RATE, llf=llf or False, num_queries=num_queries)
    images = torch.randn(2, 3, config.img_size, config.img_size)
    state, queries = model.state_dict(), [module.queries for module in model.cropr]
    logits, deployed = model(images), cropr.deploy(model, engine=False)(images)
    for image, got, fast in zip(images, logits, deployed):
        expected, _ = slow_cropr(image, state, queries, config, llf)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(got, fast)


def test_auxiliary_prediction_is_the_aggregator_of_the_paper():
    module, x = cropr.Cropr(dim=16, num_outputs=4, num_queries=3), torch.randn(2, 9, 16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state, got = (
        {name: p.detach() for name, p in module.named_parameters()},
        module.predict(x)[0].detach(),
    )
    for b in range(2):
        for m in range(3):
            weights = torch.stack([state["queries"][m] @ t / 4.0 for t in x[b]]).softmax(0)
            out = sum(w * t for w, t in zip(weights, x[b]))
            hidden = linear(norm(out, state, "aggregator.norm1"), state, "aggregator.mlp.0")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            out = out + linear(hidden, state, "aggregator.mlp.2")
            expected = linear(norm(out, state, "aggregator.norm2"), state, "aggregator.head")
            torch.testing.assert_close(got[b, m], expected, rtol=1e-4, atol=1e-5)
