"""The options of pruning: light to import, and each says on the command line what it says in Python."""

import subprocess
import sys

import pytest

import saap.prune
from saap.base.errors import UserError
from saap.base.options import settings_of
from saap.prune.options import AdaptiveOptions, FusionOptions, PruneOptions


def test_the_options_import_without_torch() -> None:
    said = (
        "import sys; from saap.prune import PruneOptions; print(PruneOptions(ratio=0.2).asked, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'ratio': 0.2} False"


def test_the_house_hands_out_what_it_names() -> None:
    from saap.prune.pruning import PruneResult, prune

    assert (saap.prune.prune, saap.prune.PruneResult, saap.prune.PruneOptions) == (prune, PruneResult, PruneOptions)
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        saap.prune.prunes  # noqa: B018


def test_what_a_researcher_sets_has_no_flag() -> None:
    hidden = {name for name, setting in settings_of(PruneOptions).items() if not setting.option.shown}
    assert {"score", "slices", "stability", "exact"} <= hidden
    assert not hidden & {"ratio", "method", "costs", "blocks", "keep_layers", "device"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PruneOptions(ratio=0.2, device="tpu"), "device 'tpu' is not known: give auto, cpu, cuda"),
        (PruneOptions(ratio=0.2, sequences=0), "0 is not allowed: give a whole number from 1"),
        (PruneOptions(ratio=0.2, method="flap", effort="normal"), "--effort is for the method saap"),
        (
            PruneOptions(ratio=0.2, vocabulary="auto", effort="normal"),
            "--effort chooses layers only: leave --vocabulary",
        ),
        (PruneOptions(ratio=0.2, compensate="bias"), "--compensate bias is for other methods: saap refits, so leave"),
        (PruneOptions(ratio=0.2, vocabulary_input=True), "--vocabulary-input is for models that lose words"),
        (PruneOptions(ratio=0.2, method="vector", stream=True), "vector needs the gradients of all weights at once"),
        (
            PruneOptions(ratio=0.2, adaptive=AdaptiveOptions(exact=True)),
            "exact is for the element score, and the score vector-token has none: leave",
        ),
        (
            PruneOptions(ratio=0.2, adaptive=AdaptiveOptions(FusionOptions(score="best"))),  # type: ignore[arg-type]
            "score best is not allowed: give vector, element",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: PruneOptions, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        options.check()
    assert "\n" not in str(error.value)
