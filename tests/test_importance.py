from __future__ import annotations

import pytest
import torch

from saap.architectures import shape_of
from saap.checkpoint import load_model
from saap.errors import SaapError
from saap.fusion import closed_form_variance, fuse
from saap.importance import estimate

IDS = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(1))


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
    scores = estimate(model, shape_of(model.config), IDS, c=c)
    vectors, elements = brute_force(model, IDS, c)
    for (kind, layer, n), t in vectors.items():
        assert scores.products[kind][layer][:, n].tolist() == pytest.approx(t, rel=1e-3, abs=1e-6)
        t = torch.tensor(t)
        expected = (t.mean() - c / 2 * t.square().mean()).abs().item()
        assert scores.vector(kind)[layer][n].item() == pytest.approx(expected, rel=1e-3, abs=1e-7)
        expected = sum(elements[kind, layer, n]) / len(IDS)
        assert scores.element[kind][layer][n].item() == pytest.approx(expected, rel=1e-3)


def test_the_default_c_is_the_number_of_tokens(tiny_model):
    model = load_model(tiny_model())
    assert estimate(model, shape_of(model.config), IDS).c == 16.0


def test_gradients_are_gone_and_flags_are_back(tiny_model):
    model = load_model(tiny_model())
    model.model.norm.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    estimate(model, shape_of(model.config), IDS)
    assert all(p.grad is None for p in model.parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_a_loss_that_is_not_finite_names_the_sequence(tiny_model):
    model = load_model(tiny_model(tie_word_embeddings=False))
    bad = next(int(token) for token in IDS[1] if token not in IDS[0])
    model.model.embed_tokens.weight.data[bad] = float("nan")
    with pytest.raises(SaapError, match="nan on calibration sequence 1"):
        estimate(model, shape_of(model.config), IDS)


def test_fused_scores_have_mean_one_per_type(tiny_model):
    model = load_model(tiny_model())
    for rows in fuse(estimate(model, shape_of(model.config), IDS)).values():
        assert torch.cat(rows).mean().item() == pytest.approx(1.0, rel=1e-5)
        assert min(row.min().item() for row in rows) >= 0


def test_closed_form_variance_is_what_a_learned_one_converges_to():
    scores = [torch.rand(50, generator=torch.Generator().manual_seed(i)) * 3 for i in range(4)]
    flat = torch.cat(scores)
    log_variance = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([log_variance], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        # sum_G I(G) / (2 sigma^2) + log sigma, with log sigma = log_variance / 2
        (flat / (2 * log_variance.exp()) + log_variance / 2).mean().backward()
        optimizer.step()
    assert log_variance.exp().item() == pytest.approx(closed_form_variance(scores).item(), rel=1e-3)
