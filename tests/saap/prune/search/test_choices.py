"""What is on offer, before any price."""

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.prune.search.choices import RUNS, Allowed, runs_of


def test_what_may_go_in_one_piece(tiny_model):
    shape = shape_of(load_model(tiny_model(num_hidden_layers=8)).config)
    runs = list(runs_of(shape, Allowed()))
    single = [(i, kind) for i in range(8) for kind in ("attention", "ffn")]
    assert [run[0] for run in runs if len(run) == 1] == single
    layers = [run for run in runs if len(run) > 1]
    assert {len(run) // 2 for run in layers} == set(RUNS)
    assert all(run[0][1] == "attention" and run[-1][1] == "ffn" for run in layers)
    assert not list(runs_of(shape, Allowed(keep=frozenset({"blocks"}))))
    kept = list(runs_of(shape, Allowed(keep_layers=frozenset({3}))))
    assert kept and all(index != 3 for run in kept for index, _ in run)
