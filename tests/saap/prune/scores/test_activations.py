import pytest
import torch

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.prune.scores.activations import collect

IDS = torch.randint(320, (5, 16), generator=torch.Generator().manual_seed(1))


def seen_inputs(model, ids):
    """Inputs of o_proj and down_proj and hidden states before and after, sequence by sequence, kept whole."""
    kept: dict[tuple[int, str], list[torch.Tensor]] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        for role, linear in (("output", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):

            def save(module, args, index=index, role=role):
                kept.setdefault((index, role), []).append(args[0][0].double())

            handles.append(linear.register_forward_pre_hook(save))
        # Not output_hidden_states: its last entry has passed the final norm.
        handles.append(
            layer.register_forward_hook(
                lambda module, args, result, index=index: kept.setdefault((index, "hidden"), []).append(
                    torch.stack([args[0][0], (result[0] if isinstance(result, tuple) else result)[0]])
                )
            )
        )
    with torch.inference_mode():
        for row in ids:
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_statistics_are_those_of_all_tokens_at_once(tiny_model, batch):
    model = load_model(tiny_model())
    found = collect(model, shape_of(model.config), IDS, batch=batch)
    kept = seen_inputs(model, IDS)
    assert found.tokens == 80
    for layer in range(3):
        for role in ("output", "down"):
            statistics = found.inputs[layer, role]
            rows = torch.cat(kept[layer, role])
            assert statistics.mean.shape == ({"output": 96, "down": 128}[role],)
            torch.testing.assert_close(statistics.mean, rows.mean(0).float(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(statistics.fluctuation, rows.var(0).float(), rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(statistics.mean_square, rows.square().mean(0).float(), rtol=1e-4, atol=1e-7)
        before, after = torch.cat(kept[layer, "hidden"], dim=1).double()
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert found.influence[layer].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-4)


def test_a_large_mean_does_not_swallow_a_small_variance(tiny_model):
    model = load_model(tiny_model())
    shape = shape_of(model.config)
    values = [1e4 + 1e-2 * torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    feed = iter(values)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: (next(feed),))
    found = collect(model, shape, IDS, batch=1).inputs[0, "down"]
    expected = torch.cat(values, dim=1)[0].double().var(0).float()
    torch.testing.assert_close(found.fluctuation, expected, rtol=1e-3, atol=0)


def test_a_layer_that_changes_nothing_has_no_influence(tiny_model):
    model = load_model(tiny_model())
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = collect(model, shape_of(model.config), IDS)
    assert found.influence[1].item() == pytest.approx(0, abs=1e-6)
    assert min(found.influence[0].item(), found.influence[2].item()) > 1e-3


def test_packed_matrices_and_missing_modules(tiny_family):
    model = load_model(tiny_family("phi3"))
    found = collect(model, shape_of(model.config), IDS)
    sizes = {"output": (96,), "down": (128,)}
    assert {place: s.mean.shape for place, s in found.inputs.items()} == {
        (i, r): sizes[r] for i in range(3) for r in sizes
    }


def test_progress_counts_sequences_and_hooks_are_gone(tiny_model):
    model = load_model(tiny_model())
    calls = []
    collect(model, shape_of(model.config), IDS, batch=2, progress=lambda *call: calls.append(call))
    assert calls == [("reading activations (sequences)", n, 5) for n in (0, 2, 4, 5)]
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_errors_are_one_line(tiny_model):
    model = load_model(tiny_model())
    shape = shape_of(model.config)
    with pytest.raises(UserError, match="at least 2 tokens"):
        collect(model, shape, IDS[:1, :1])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"^layer 1: the inputs of down are not finite.*$"):
        collect(model, shape, IDS)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = 0
    model.model.layers[2].mlp.down_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(UserError, match=r"^layer 2: its output is not finite"):
        collect(model, shape, IDS)
    assert not any(module._forward_pre_hooks for module in model.modules())
