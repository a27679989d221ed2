import weakref

import pytest
import torch

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.prune.scores.cache import keep_scores, read_scores, scores_path
from saap.prune.scores.fusion import (
    FusionOptions,
    fuse,
    layer_weighted,
    stability_factor,
)
from saap.prune.scores.importance import TYPES, estimate, per_structure

IDS = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def scored(tmp_path_factory, llama):
    """A model that no test changes, its shape and its scores."""
    model = load_model(llama(tmp_path_factory.mktemp("scored") / "tiny"))
    shape = shape_of(model.config)
    return model, shape, estimate(model, shape, IDS)


def brute_force(model, ids, c):
    """t_j and the streamed element score of every structure, straight from the formulas with plain autograd."""
    vectors, elements = {}, {}
    for _j, row in enumerate(ids):
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for index, layer in enumerate(model.model.layers):
            attn, mlp = layer.self_attn, layer.mlp

            def products(*slices):
                return torch.cat([(w.grad * w.detach())[rows][:, cols].flatten() for w, rows, cols in slices])

            everything = slice(None)
            groups = {
                ("ffn", index, n): [
                    (mlp.gate_proj.weight, [n], everything),
                    (mlp.up_proj.weight, [n], everything),
                    (mlp.down_proj.weight, everything, [n]),
                ]
                for n in (0, 5)
            }
            for h in range(6):
                span = list(range(16 * h, 16 * h + 16))
                groups["head", index, h] = [
                    (attn.q_proj.weight, span, everything),
                    (attn.o_proj.weight, everything, span),
                ]
            for g in range(3):
                span = list(range(16 * g, 16 * g + 16))
                own = [(attn.k_proj.weight, span, everything), (attn.v_proj.weight, span, everything)]
                groups["group", index, g] = own + groups["head", index, 2 * g] + groups["head", index, 2 * g + 1]
            for key, slices in groups.items():
                p = products(*slices)
                vectors.setdefault(key, []).append(p.sum().item())
                elements.setdefault(key, []).append((p - c / 2 * p**2).abs().sum().item())
    model.zero_grad()
    return vectors, elements


@pytest.mark.parametrize("c", [1.0, 16.0])
def test_scores_are_those_of_the_formulas(tiny_model, c):
    model = load_model(tiny_model())
    shape = shape_of(model.config)
    scores = estimate(model, shape, IDS, c=c)
    vectors, elements = brute_force(model, IDS, c)
    for (kind, layer, n), t in vectors.items():
        assert per_structure(scores.products, kind, shape)[layer][:, n].tolist() == pytest.approx(t, rel=1e-3, abs=1e-6)
        t = torch.tensor(t)
        expected = (t.mean() - c / 2 * t.square().mean()).abs().item()
        assert scores.vector(kind, shape)[layer][n].item() == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert scores.fluctuating(kind, shape)[layer][:, n].tolist() == pytest.approx(
            (t - c / 2 * t**2).abs().tolist(), rel=1e-3, abs=1e-7
        )
        expected = sum(elements[kind, layer, n]) / len(IDS)
        assert scores.fine(kind, shape)[layer][n].item() == pytest.approx(expected, rel=1e-3)


def test_the_exact_element_score_takes_the_absolute_value_last(tiny_model):
    model = load_model(tiny_model())
    shape = shape_of(model.config)
    exact = estimate(model, shape, IDS, c=3.0, element="exact")
    first, second = 0, 0
    for row in IDS:
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        gradient = model.model.layers[1].mlp.down_proj.weight.grad
        first, second = first + gradient / 3, second + gradient**2 / 3
    model.zero_grad()
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    expected = (first * weight - 1.5 * second * weight**2).abs().sum(0)
    assert torch.allclose(exact.fine("ffn", shape, "output")[1], expected, rtol=1e-3)
    # The streamed score is an upper bound of it, and ranks alike.
    streamed = estimate(model, shape, IDS, c=3.0)
    for kind in TYPES:
        for upper, lower in zip(streamed.fine(kind, shape), exact.fine(kind, shape), strict=True):
            assert (upper >= lower * (1 - 1e-5)).all()
    for a, b in zip(streamed.products.values(), exact.products.values(), strict=True):
        assert torch.equal(a, b)


def test_output_slices_leave_the_other_matrices_out(scored):
    _, shape, scores = scored
    for layer in range(3):
        heads = scores.products[layer, "output"]
        assert torch.equal(
            per_structure(scores.products, "ffn", shape, "output")[layer], scores.products[layer, "down"]
        )
        assert torch.equal(per_structure(scores.products, "head", shape, "output")[layer], heads)
        groups = per_structure(scores.products, "group", shape, "output")[layer]
        assert torch.allclose(groups, heads.view(3, 3, 2).sum(2))
        # The chain rule: what the slices of up_proj and down_proj say is the same number.
        assert torch.allclose(scores.products[layer, "up"], scores.products[layer, "down"], rtol=1e-3, atol=1e-6)


def test_the_token_score_is_the_fisher_of_a_mask(scored):
    """Brute force: one mask per token on the input of down_proj and on each head; its squared gradients, summed."""
    model, shape, scores = scored
    attn, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    channels, heads = torch.zeros(128), torch.zeros(6)
    for row in IDS:
        mask = torch.ones(1, 16, 128, requires_grad=True)
        per_head = torch.ones(1, 16, 6, requires_grad=True)
        handles = [
            mlp.down_proj.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)),
            attn.o_proj.register_forward_pre_hook(
                lambda _, args, mask=per_head: (args[0] * mask.repeat_interleave(16, dim=-1),)
            ),
        ]
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for handle in handles:
            handle.remove()
        channels += 16 / 2 * mask.grad[0].square().sum(0) / 3
        heads += 16 / 2 * per_head.grad[0].square().sum(0) / 3
    assert torch.allclose(scores.tokenwise("ffn", shape)[1], channels, rtol=1e-3, atol=1e-9)
    assert torch.allclose(scores.tokenwise("head", shape)[1], heads, rtol=1e-3, atol=1e-9)
    assert torch.allclose(scores.tokenwise("group", shape)[1], heads.view(3, 2).sum(1), rtol=1e-3, atol=1e-9)


def test_a_model_is_left_as_it_was_and_no_graph_is_kept(tiny_model):
    """A hook that holds its own tensor would keep every sequence's activations for good."""
    model, seen = load_model(tiny_model()), []
    model.model.norm.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    watching = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: seen.append(weakref.ref(args[0]))
    )
    assert estimate(model, shape_of(model.config), IDS).c == 16.0  # the number of tokens
    watching.remove()
    assert [ref() for ref in seen] == [None] * 3
    assert all(p.grad is None for p in model.parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_a_loss_that_is_not_finite_names_the_sequence(tiny_model):
    model = load_model(tiny_model(tie_word_embeddings=False))
    bad = next(int(token) for token in IDS[1] if token not in IDS[0])
    model.model.embed_tokens.weight.data[bad] = float("nan")
    with pytest.raises(UserError, match="nan on calibration sequence 1"):
        estimate(model, shape_of(model.config), IDS)


@pytest.mark.parametrize(
    ("score", "mean"), [("vector", 0.5), ("element", 0.5), ("fused", 1.0), ("vector-token", 1.0), ("fused-token", 1.5)]
)
def test_fused_scores_have_half_their_count_as_mean_over_the_heads_of_a_model(scored, score, mean):
    _, shape, scores = scored
    fused = fuse(scores, shape, FusionOptions(score=score))
    for kind in ("head", "group"):
        assert torch.cat(fused[kind]).mean().item() == pytest.approx(mean, rel=1e-5)
    assert not any(len(row) for kind in ("conv", "delta") for row in fused[kind]), "the model has none"
    assert min(row.min().item() for rows in fused.values() for row in rows if len(row)) >= 0


def test_stability_multiplies_the_fused_score(scored):
    _, shape, scores = scored
    plain, steady = (fuse(scores, shape, FusionOptions(stability=s)) for s in (0.0, -0.7))
    for kind in ("head", "group"):
        factors = stability_factor(scores.fluctuating(kind, shape), -0.7)
        for before, after, factor in zip(plain[kind], steady[kind], factors, strict=True):
            assert torch.allclose(after, before * factor)
            assert factor.std() > 0


def test_a_layer_counts_by_the_mean_of_its_own_scores():
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([]), torch.tensor([1.0, 1.0, 7.0]), torch.zeros(2)]
    first, empty, second, nothing = layer_weighted(rows)
    assert torch.allclose(first, rows[0] * 1.5 / 2.25) and torch.allclose(second, rows[2] * 3 / 2.25)
    assert not len(empty) and torch.equal(nothing, rows[3])
    assert layer_weighted([torch.zeros(2)])[0].tolist() == [0, 0]


def test_channels_have_the_layer_factor_by_default_and_heads_do_not(scored):
    _, shape, scores = scored
    fused = fuse(scores, shape)
    for kind, weighted in (("ffn", layer_weighted), ("head", list), ("group", list)):
        terms = scores.vector(kind, shape), scores.tokenwise(kind, shape)
        sums = [sum(row / (2 * torch.cat(term).mean()) for row, term in zip(rows, terms, strict=True))
                for rows in zip(*terms, strict=True)]  # fmt: skip
        assert all(torch.allclose(a, b) for a, b in zip(weighted(sums), fused[kind], strict=True))


def kept(weights, ids, settings, compute):
    """The scores, made if they are not kept; and whether they were."""
    path = scores_path(weights, ids, settings)
    if (found := read_scores(path)) is not None:
        return found, True
    keep_scores(path, scores := compute())
    return scores, False


def test_scores_are_cached_by_content(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    model = load_model(tiny_model())
    shape = shape_of(model.config)
    calls = []

    def compute():
        calls.append(1)
        return estimate(model, shape, IDS)

    first, hit = kept("weights", IDS, {"c": None}, compute)
    assert not hit
    again, hit = kept("weights", IDS, {"c": None}, compute)
    assert hit and len(calls) == 1
    assert (again.c, again.loss) == (first.c, first.loss)
    for part in ("products", "element", "token"):
        assert getattr(first, part).keys() == getattr(again, part).keys()
        assert all(torch.equal(getattr(again, part)[key], tensor) for key, tensor in getattr(first, part).items())
    for other in (("others", IDS, {"c": None}), ("weights", IDS + 1, {"c": None}), ("weights", IDS, {"c": 1})):
        assert not kept(*other, lambda: first)[1]
    for entry in (tmp_path / "cache" / "scores").glob("*.safetensors"):
        entry.write_bytes(b"torn")
    assert not kept("weights", IDS, {"c": None}, compute)[1]


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_without_the_element_score_the_others_are_the_same(tiny_model, overrides):
    """By the chain rule, without one gradient of a weight; biases are no part of a structure's t_j."""
    model = load_model(tiny_model(**overrides))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    shape = shape_of(model.config)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    full, light = estimate(model, shape, IDS), estimate(model, shape, IDS, element="none")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert light.element == {}
    assert light.products.keys() == full.products.keys() and light.token.keys() == full.token.keys()
    for part in ("products", "token"):
        for key, expected in getattr(full, part).items():
            assert torch.allclose(getattr(light, part)[key], expected, rtol=1e-3, atol=1e-6), (part, key)
