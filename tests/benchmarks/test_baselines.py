"""The systems that the benchmarks compare with are what their papers say: each against a slow, obvious version."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomise, reference_vit

import cropr_kernels as cropr

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from rivals import ONCE, SYSTEMS, Reduced, ReducedClassifier
from rivals.learned import DynamicViT, PatchMerger, Sinkhorn, SiT
from rivals.merging import DPCKNN, merge_fused, merge_pairs
from rivals.network import Given, Reduction, Selector, attention_of, patches_of
from rivals.selection import ATS, EViT, KMedoids

COUNTS = [50, 40, 31]
DIM, TOKENS, HEADS, KEEP = 8, 22, 2, 14


def counts_for(name):
    return [65, 31, 31] if name in ONCE else COUNTS


def make(name, **options):
    return Reduced(randomise(reference_vit(**options)), SYSTEMS[name], counts_for(name)).eval()


def given_to(x, prefix=1, sizes=None):
    """Everything a reducer may ask for."""
    batch, tokens, _ = x.shape
    q, k, v = (torch.randn(batch, HEADS, tokens, 4, dtype=x.dtype) for _ in range(3))
    attention = (q @ k.transpose(2, 3)).softmax(-1).to(x.dtype)
    return Given(attention, attention[:, :, 0], k, v, torch.randn(batch, tokens - prefix, 12), None, sizes)


@pytest.mark.parametrize("name", SYSTEMS)
def test_prefix_tokens_stay_first_and_as_they_are(name):
    x = torch.randn(3, TOKENS, DIM)
    for prefix in (1, 3):
        reducer, given = SYSTEMS[name](DIM, KEEP - prefix, TOKENS - prefix).eval(), given_to(x, prefix)
        given = given._replace(patches=reducer.look(given.patches))
        reduction = reducer(x, given, KEEP, prefix)
        assert torch.equal(reduction.tokens[:, :prefix], x[:, :prefix])
        assert reduction.tokens.shape[1] == KEEP or name == "ATS, trimmed"


@pytest.mark.parametrize("name", SYSTEMS)
def test_without_reduction_they_are_the_plain_model(name):
    model, images = randomise(reference_vit(init_values=0.1)).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(Reduced(model, SYSTEMS[name], [65, 65, 65])(images), model(images))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "ATS, trimmed"])
def test_they_leave_as_many_tokens_as_the_schedule_says(name):
    network, seen = make(name), []
    for block in network.backbone.blocks:
        block.norm1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 64))
    assert seen == [65, *counts_for(name)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_same_seed_gives_the_same_bits(name):
    network, images, outputs = make(name, init_values=0.1), torch.randn(2, 3, 64, 64), []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(network(images))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_trained_parameter_gets_a_gradient_under_autocast(name):
    network = Reduced(randomise(reference_vit()), SYSTEMS[name], [65, 40, 40])
    task = ReducedClassifier(network, 0.1, teacher=reference_vit()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = task(torch.randn(2, 3, 64, 64), torch.tensor([0, 3]))
    sum(losses.values()).backward()
    missing = [name for name, parameter in task.named_parameters() if parameter.grad is None]
    assert not missing and all(parameter.grad.isfinite().all() for parameter in task.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert task.eval().predictions(torch.randn(2, 3, 64, 64))[-1].isfinite().all()


class ByQuery(Selector):
    def __init__(self, query):
        super().__init__()
        self.query = query

    def scores(self, x, given, num_prefix):
        return torch.ops.cropr.scores(x, self.query)


@pytest.mark.parametrize("llf", [False, True])
@pytest.mark.parametrize("options", [{}, dict(reg_tokens=3), dict(rope=True, swiglu=True, global_pool="avg")])
def test_a_network_reduced_by_cropr_scores_is_cropr(options, llf):
    model = randomise(reference_vit(**options)).eval()
    pruned = cropr.apply(randomise(reference_vit(**options)), rate=9, llf=llf)
    model.load_state_dict({k: v for k, v in pruned.state_dict().items() if not k.startswith("cropr.")})
    queries = iter([module.query() for module in pruned.cropr])
    counts = pruned.cropr.schedule(64 + model.num_prefix_tokens, 4, model.num_prefix_tokens, llf)
    network = Reduced(model, lambda dim, kept, patches: ByQuery(next(queries)), counts, llf=llf)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), pruned.eval()(images), rtol=1e-5, atol=1e-5)


def test_attention_is_the_softmax_that_sdpa_keeps_to_itself():
    q, k, v = (torch.randn(2, HEADS, 10, 4) for _ in range(3))
    sizes = torch.randint(1, 5, (2, 10)).float()
    plain, weighed = Given(), Given(sizes=sizes, log_sizes=sizes.log())
    torch.testing.assert_close(attention_of(q, k, plain) @ v, F.scaled_dot_product_attention(q, k, v))
    bias = sizes.log()[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(attention_of(q, k, weighed) @ v, expected)


def test_attention_top_k_keeps_what_the_class_token_looks_at():
    model = randomise(reference_vit(depth=2)).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        x, _ = model.embed(images)
        q, k, _ = model.blocks[0].attn.project(model.blocks[0].norm1(x))
        row = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0].mean(1)
        row[:, 0] = 2.0
        kept = row.topk(20).indices.sort(1).values
        after = model.blocks[0](x).gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        expected = model.forward_head(model.norm(model.blocks[1](after)))
        torch.testing.assert_close(Reduced(model, SYSTEMS["attention top-k"], [20])(images), expected)


def test_pixel_variance_follows_the_patches_through_all_layers():
    images = torch.randn(2, 3, 64, 64) * torch.linspace(0.1, 2, 64)
    network, seen = make("pixel variance"), []
    network.reducers["2"].register_forward_hook(lambda module, inputs, output: seen.append((inputs[1], output)))
    with torch.no_grad():
        network(images)
    given, reduction = seen[0]
    alive = given.positions.gather(1, reduction.idx)
    variance = torch.stack(
        [
            torch.stack([image[:, r : r + 8, c : c + 8].var() for r in range(0, 64, 8) for c in range(0, 64, 8)])
            for image in images
        ]
    )
    expected = variance.topk(30).indices.sort(1).values + 1
    assert torch.equal(alive[:, 1:], expected) and (alive[:, 0] == 0).all()


def test_patches_are_those_of_the_embedding():
    model, images = reference_vit(), torch.randn(2, 3, 64, 64)
    weight = model.patch_embed.proj.weight.flatten(1)
    expected = model.patch_embed(images).flatten(1, 2)
    torch.testing.assert_close(patches_of(images, 8) @ weight.T + model.patch_embed.proj.bias, expected)


def test_evit_fuses_those_that_leave_by_attention():
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    given = given_to(x)
    tokens = EViT()(x, given, KEEP, 1).tokens
    for b in range(2):
        row = given.class_row[b].mean(0)
        order = sorted(range(1, TOKENS), key=lambda i: -row[i].item())
        kept, left = sorted(order[: KEEP - 2]), order[KEEP - 2 :]
        fused = sum(row[i] * x[b, i] for i in left)
        torch.testing.assert_close(tokens[b], torch.stack([x[b, 0], *(x[b, i] for i in kept), fused]))


def test_evit_merges_between_attention_and_mlp():
    model = randomise(reference_vit(depth=2)).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        x, _ = model.embed(images)
        first, second = model.blocks
        q, k, _ = first.attn.project(first.norm1(x))
        x = x + first.attn(first.norm1(x))
        row = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]
        x = EViT()(x, Given(class_row=row), 20, 1).tokens
        x = second(x + first.mlp(first.norm2(x)))
        torch.testing.assert_close(Reduced(model, SYSTEMS["EViT"], [20])(images), model.forward_head(model.norm(x)))


def test_ats_samples_the_cumulated_significance():
    x = torch.randn(3, TOKENS, DIM, dtype=torch.float64)
    given = given_to(x)
    reduction = ATS()(x, given, KEEP, 1)
    for b in range(3):
        significance = torch.zeros(TOKENS - 1, dtype=torch.float64)
        for head in range(HEADS):
            of_head = torch.tensor(
                [given.class_row[b, head, i] * given.values[b, head, i].norm() for i in range(1, TOKENS)]
            )
            significance += of_head / of_head.sum()
        chosen, total = [], significance.sum().item()
        for point in range(KEEP - 1):
            threshold, running = (point + 0.5) / (KEEP - 1) * total, 0.0
            for i in range(TOKENS - 1):
                running += significance[i].item()
                if running >= threshold:
                    chosen.append(i + 1)
                    break
        real = reduction.sizes[b] > 0
        assert reduction.idx[b][real].tolist() == [0, *sorted(set(chosen))]
        torch.testing.assert_close(reduction.tokens[b], x[b, reduction.idx[b]])


def test_ats_padding_changes_neither_output_nor_gradient():
    images, grads, outputs = torch.randn(2, 3, 64, 64, dtype=torch.float64), [], []
    for name in ("ATS", "ATS, trimmed"):
        torch.manual_seed(1)
        network = make(name).double()
        output = network(images)
        output.square().sum().backward()
        outputs.append(output.detach())
        grads.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def slow_medoids(points, weight, count, rounds):
    medoids = weight.topk(count).indices.tolist()
    for _ in range(rounds):
        clusters = {m: [m] for m in medoids}
        for i in range(len(points)):
            if i not in medoids:
                nearest = min(medoids, key=lambda m, i=i: (points[i] - points[m]).norm().item())
                clusters[nearest].append(i)
        medoids = [
            min(members, key=lambda i, own=members: sum(weight[j] * (points[i] - points[j]).norm() for j in own).item())
            for members in clusters.values()
        ]
    return sorted(medoids)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_k_medoids_keeps_the_middle_of_every_cluster(rounds):
    x = torch.randn(3, TOKENS, DIM)
    given = given_to(x)
    idx = KMedoids(rounds)(x, given, KEEP, 1).idx
    for b in range(3):
        weight = given.attention[b].mean(0).sum(0)[1:]
        expected = slow_medoids(x[b, 1:], weight, KEEP - 1, rounds)
        assert idx[b].tolist() == [0, *(i + 1 for i in expected)]


def test_k_medoids_of_equal_tokens_are_as_many_members():
    x = torch.ones(1, TOKENS, DIM)
    idx = KMedoids()(x, given_to(x), KEEP, 1).idx[0].tolist()
    assert len(set(idx)) == KEEP and set(idx) <= set(range(TOKENS))


def slow_density_peaks(points, count, neighbours):
    n = len(points)
    apart = [[(points[i] - points[j]).norm().item() / points.shape[1] ** 0.5 for j in range(n)] for i in range(n)]
    density = [-sum(d * d for d in sorted(apart[i])[1 : neighbours + 1]) / neighbours for i in range(n)]
    delta = []
    for i in range(n):
        above = [apart[i][j] for j in range(n) if density[j] > density[i]]
        delta.append(min(above) if above else max(apart[i]))
    score = [torch.tensor(density[i]).exp().item() * delta[i] for i in range(n)]
    centres = sorted(sorted(range(n), key=lambda i: -score[i])[:count])
    return [centres.index(min(centres, key=lambda c, i=i: apart[i][c])) for i in range(n)]


@pytest.mark.parametrize("learned", [False, True])
def test_dpc_knn_merges_clusters_around_density_peaks(learned):
    x = torch.randn(3, TOKENS, DIM, dtype=torch.float64)
    reducer = DPCKNN(DIM if learned else None).double()
    tokens = reducer(x, given_to(x), KEEP, 1).tokens
    for b in range(3):
        points = x[b, 1:]
        weight = reducer.score(points).exp() if learned else torch.ones(TOKENS - 1, 1, dtype=torch.float64)
        cluster = torch.tensor(slow_density_peaks(points, KEEP - 1, 5))
        for c in range(KEEP - 1):
            own = cluster == c
            torch.testing.assert_close(tokens[b, c + 1], (points * weight)[own].sum(0) / weight[own].sum())


def test_dpc_knn_conserves_mass():
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    reducer = DPCKNN()
    cluster = reducer.clusters(torch.cdist(x[:, 1:], x[:, 1:]).float() / DIM**0.5, KEEP - 1)
    counts = F.one_hot(cluster, KEEP - 1).sum(1)
    assert (counts > 0).all()
    tokens = reducer(x, given_to(x), KEEP, 1).tokens[:, 1:]
    torch.testing.assert_close((tokens * counts.unsqueeze(-1)).sum(1), x[:, 1:].sum(1))


def slow_pairs(x, metric, sizes, count, prefix):
    """One image: the `count` most similar (even, odd) pairs, an even token at most once; prefix, unmerged even, odd."""
    n = x.shape[0]
    best = {}
    for i in range(0, n, 2):
        if i < prefix:
            continue
        odd = [j for j in range(1, n, 2) if j >= prefix]
        best[i] = max((F.cosine_similarity(metric[i], metric[j], dim=0).item(), j) for j in odd)
    moving = sorted(best, key=lambda i: -best[i][0])[:count]
    mass, total = x * sizes.unsqueeze(-1), sizes.clone()
    for i in moving:
        j = best[i][1]
        mass[j] += mass[i]
        total[j] += total[i]
    even = [i for i in range(0, n, 2) if i >= prefix and i not in moving]
    order = [*range(prefix), *even, *(j for j in range(1, n, 2) if j >= prefix)]
    return order, mass[order] / total[order].unsqueeze(-1), total[order]


@pytest.mark.parametrize("merge", [merge_pairs, merge_fused])
@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_tome_merges_the_most_similar_pairs(prefix, merge):
    x, metric = torch.randn(3, 31, 8, dtype=torch.float64), torch.randn(3, 31, 5, dtype=torch.float64)
    sizes = torch.randint(1, 4, (3, 31)).float()
    merged, total = merge(x, metric, sizes, 6, prefix)
    for b in range(3):
        order, expected, expected_total = slow_pairs(x[b], metric[b], sizes[b].double(), 6, prefix)
        if merge is merge_fused:  # in order of position
            back = sorted(range(len(order)), key=order.__getitem__)
            expected, expected_total = expected[back], expected_total[back]
        torch.testing.assert_close(merged[b], expected)
        torch.testing.assert_close(total[b].double(), expected_total)
    torch.testing.assert_close(
        (merged * total.double().unsqueeze(-1)).sum(1), (x * sizes.double().unsqueeze(-1)).sum(1)
    )


@pytest.mark.parametrize("cls", [SiT, Sinkhorn, PatchMerger])
def test_mixers_give_means_of_the_patches(cls):
    patches = TOKENS - 1
    reducer = cls(DIM, 5, patches) if cls is SiT else cls(DIM, 5)
    x = torch.randn(2, TOKENS, DIM)
    reduction = randomise(reducer)(x, given_to(x), 6, 1)
    assert reduction.weights.shape == (2, 5, patches) and (reduction.weights >= 0).all()
    torch.testing.assert_close(reduction.weights.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(reduction.tokens[:, 1:], reduction.weights @ x[:, 1:])


def test_sit_weighs_tokens_by_an_mlp_of_each():
    reducer, patches = randomise(SiT(DIM, 5, 9)), torch.randn(1, 9, DIM)
    logits = torch.stack([reducer.mlp(patch) * reducer.scale for patch in patches[0]])  # (9, 5)
    torch.testing.assert_close(reducer.log_weights(patches)[0].softmax(-1), logits.T.softmax(-1))


def test_patch_merger_weighs_normed_tokens_by_queries():
    reducer, patches = randomise(PatchMerger(DIM, 5)), torch.randn(2, 9, DIM)
    for b in range(2):
        logits = torch.stack([reducer.norm(patches[b]) @ query for query in reducer.queries])
        torch.testing.assert_close(reducer.log_weights(patches)[b], logits)


def test_sinkhorn_is_the_textbook_one():
    reducer, patches = Sinkhorn(DIM, 5, rounds=3), torch.randn(2, 9, DIM)
    weights = reducer.log_weights(patches).softmax(-1)
    for b in range(2):
        similarity = torch.stack(
            [torch.stack([F.cosine_similarity(c, p, dim=0) for p in patches[b]]) for c in reducer.centres]
        )
        plan = (similarity / 0.1).exp()
        for _ in range(3):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        torch.testing.assert_close(weights[b], plan / plan.sum(1, keepdim=True))
    many = Sinkhorn(DIM, 5, rounds=200).log_weights(patches).exp()
    torch.testing.assert_close(many.sum(2), torch.full((2, 5), 9 / 5), rtol=1e-3, atol=1e-3)


def test_dynamic_vit_masks_in_training_what_it_would_drop(monkeypatch):
    model = randomise(reference_vit()).double()
    network = Reduced(model, DynamicViT, [65, 31, 31]).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def sure(decision, hard):  # who has the best 30 chances is drawn
        stays = torch.zeros_like(decision[..., 0]).scatter(1, decision[..., 0].topk(30).indices, 1.0)
        return torch.stack([stays, 1 - stays], -1)

    monkeypatch.setattr(F, "gumbel_softmax", sure)
    with torch.no_grad():
        masked = network.train()(images)
        torch.testing.assert_close(masked, network.eval()(images), rtol=1e-5, atol=1e-6)


def test_dynamic_vit_pays_for_a_share_that_is_not_the_target(monkeypatch):
    reducer = DynamicViT(DIM, 7, 21, stages=2).train()
    x = torch.randn(3, TOKENS, DIM)
    reduction = reducer(x, Given(), 8, 1)
    alive = reduction.alive[:, 1:]
    assert set(alive.unique().tolist()) <= {0.0, 1.0} and (reduction.alive[:, 0] == 1).all()
    expected = sum((row.mean() - 7 / 21) ** 2 for row in alive) / 3 * 2.0 / 2
    torch.testing.assert_close(reduction.loss, expected)
    reduction.loss.backward()
    assert reducer.decide[0].weight.grad.abs().sum() > 0
    again = reducer(x, Given(alive=reduction.alive.detach()), 8, 1)
    assert (again.alive <= reduction.alive).all()


def test_dynamic_vit_learns_the_tokens_that_are_alive():
    from rivals.network import Passed

    tokens, expected = torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)
    alive = torch.tensor([[1.0, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
    loss = DynamicViT(DIM, 2, 4).token_loss(Passed(tokens, [], alive), expected, 1)
    pairs = [(0, 1), (0, 3), (1, 4)]
    torch.testing.assert_close(loss, sum(F.mse_loss(tokens[p], expected[p]) for p in pairs) / 3)


def test_a_taught_network_has_no_loss_where_it_is_its_teacher():
    torch.manual_seed(0)
    teacher = randomise(reference_vit()).eval()
    network = Reduced(reference_vit(), DynamicViT, [65, 31, 31])
    network.backbone.load_state_dict(teacher.state_dict())
    task = ReducedClassifier(network, teacher=teacher).train()
    network.reducers["1"].forward = lambda x, *rest: Reduction(x, alive=torch.ones(x.shape[:2]))
    losses = task(torch.randn(2, 3, 64, 64), torch.tensor([0, 3]))
    assert losses["aux"].abs() < 1e-6 and losses["main"] > 0


def test_training_sees_backbone_and_new_parts_by_the_usual_names():
    from cropr_kernels.train import Config
    from cropr_kernels.train.optim import is_new, layer_of

    task = ReducedClassifier(Reduced(reference_vit(), SYSTEMS["SiT"], [65, 31, 31]), teacher=reference_vit())
    names = [name for name, _ in task.named_parameters()]
    assert {layer_of(name, 4) for name in names if not is_new(name)} == set(range(6))
    assert {name.split(".")[0] for name in names if is_new(name)} == {"reducers"}
    assert set(task.state_dict()) == set(names) and Config().layer_decay is not None


def test_refusals():
    with pytest.raises(ValueError, match="AttentionTopK needs a class token"):
        Reduced(reference_vit(class_token=False, global_pool="avg"), SYSTEMS["attention top-k"], COUNTS)
    with pytest.raises(ValueError, match="ToMe mixes tokens: they cannot come back"):
        Reduced(reference_vit(), SYSTEMS["ToMe"], [50, 40], llf=True)
    with pytest.raises(ValueError, match="EViT mixes tokens: they have no rotary positions"):
        Reduced(reference_vit(rope=True), SYSTEMS["EViT"], COUNTS)(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="SiT is taught, and there is no teacher"):
        ReducedClassifier(Reduced(reference_vit(), SYSTEMS["SiT"], [65, 31, 31]))
    with pytest.raises(ValueError, match="ToMe: 65 tokens, 1 of them prefix, can lose 32 at most, not 35"):
        Reduced(reference_vit(), SYSTEMS["ToMe"], [30, 30, 30])(torch.randn(1, 3, 64, 64))
    with pytest.raises(TypeError, match="must be the reference ViT, got Linear"):
        Reduced(torch.nn.Linear(2, 2), SYSTEMS["SiT"], COUNTS)


def test_a_reducer_gets_what_it_declares_and_no_more(monkeypatch):
    monkeypatch.setattr(EViT, "needs", frozenset())
    with pytest.raises(ValueError, match="looks at class_row, and does not declare it"):
        make("EViT")(torch.randn(1, 3, 64, 64))


def test_non_salient_keeps_what_cropr_drops():
    pytest.importorskip("torchmetrics", reason="needs the train extra")
    from accuracy import NonSalient

    x = torch.randn(2, 10, 8)
    module = cropr.Cropr(8, 3)
    plain = module(x, 5).kept_idx
    expected, _ = module.predict(x)
    module.__class__ = NonSalient
    prediction, scores = module.predict(x)
    for split in (module(x, 5), module(x, 5, 0, scores)):
        assert torch.equal(split.pruned_idx, plain)
    assert torch.equal(prediction, expected)


def test_the_table_measures_every_system_on_one_set_of_weights():
    import table

    plain = randomise(reference_vit(img_size=224, patch_size=16, embed_dim=32, depth=12)).eval().requires_grad_(False)
    with torch.inference_mode():
        models = table.systems(plain)
        rows = {row["system"]: row for row in table.cell(models, torch.randn(1, 3, 224, 224), 2, "eager", 1)}
        scorers = table.cell(table.architectures(plain), torch.randn(1, 3, 224, 224), 1, "eager", 1)
    names = {f"{system} | {schedule}" for system, schedule, _ in table.ROWS}
    assert set(rows) == names | {"unpruned", "plain"} and len(names) == len(table.ROWS)
    for name, row in rows.items():
        assert row["speed-up"] > 0 and row["peak MiB"] > 0
        assert name in ("unpruned", "plain") or row["GFLOPs"] < 0.75 * rows["unpruned"]["GFLOPs"]
    own = {parameter.data_ptr() for parameter in plain.parameters()}
    for name, model in models.items():
        backbone = getattr(model, "backbone", model)
        assert {parameter.data_ptr() for parameter in backbone.parameters()} <= own, name
    flops = {row["system"]: row["GFLOPs"] for row in scorers}
    assert flops["simple"] == flops["several heads, folded"] < flops["several heads, as published"]


def test_several_heads_as_published_choose_what_the_folded_ones_do():
    import table

    module = randomise(cropr.Cropr(16, 3, num_heads=4))
    x = torch.randn(2, 20, 16)
    published, folded = table.SeveralHeads(module)(x, 12, 1), module.eval()(x, 12, 1)
    assert torch.equal(published.kept_idx, folded.kept_idx) and torch.equal(published.kept, folded.kept)
