"""How many tokens fit into minutes."""

import json
from dataclasses import replace

import pytest
from support.command_line import here, refused

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import read_config
from saap.models.record import read_record
from saap.tune import pace
from saap.tune.options import TuneOptions
from saap.tune.pace import KeptTokens, Pace, pace_of

OPTIONS = TuneOptions()  # steps of 1,024 tokens


def test_whole_steps_of_what_is_left_of_the_time():
    assert Pace(fixed_s=10.0, token_s=0.01).tokens_in(1.0, OPTIONS) == 4 * 1024  # 5,000 would fit
    with pytest.raises(UserError, match=r"--minutes 0.3 is too short: .* take about 0.3 minutes here: give more"):
        Pace(fixed_s=10.0, token_s=0.01).tokens_in(0.3, OPTIONS)


def test_what_a_token_takes(tiny_model, monkeypatch):
    """Products of the layers forward, to the inputs and to the scales; of the head two; of the teacher one."""
    monkeypatch.setattr(pace, "product_rate", lambda *_: 1e6 / pace.OF_RATE)
    shape = shape_of(read_config(tiny_model()))
    head = shape.vocab * shape.hidden

    def micros(teacher, recomputed, options=OPTIONS):
        return pace_of(shape, teacher, options, recomputed=recomputed).token_s * 1e6

    assert micros(None, recomputed=False) == pytest.approx(2 * (3 * shape.layer_weights + 2 * head))
    assert micros(None, recomputed=True) - micros(None, recomputed=False) == pytest.approx(2 * shape.layer_weights)
    assert micros(shape, recomputed=False) - micros(None, recomputed=False) == pytest.approx(
        2 * (shape.layer_weights + head)
    )
    twice = replace(OPTIONS, training=replace(OPTIONS.training, passes=2))
    assert micros(None, recomputed=False, options=twice) == pytest.approx(2 * micros(None, recomputed=False))
    by_itself = pace_of(shape, None, replace(OPTIONS, integers="nearest"), recomputed=False)
    assert by_itself.fixed_s == pace.START_S < pace_of(shape, None, OPTIONS, recomputed=False).fixed_s


@pytest.mark.parametrize("damaged", ["", "{}", '{"tokens": -1}', '{"tokens": "many"}', "[]"])
def test_a_number_that_is_not_there_is_not_known(tmp_path, damaged):
    kept = KeptTokens(tmp_path / "out", 5)
    assert kept.read() is None
    kept.write(2048)
    assert kept.read() == 2048 and KeptTokens(tmp_path / "out", 6).read() is None
    (path,) = (tmp_path / ".out.tuning").iterdir()
    path.write_text(damaged)
    assert kept.read() is None
    kept.discard()
    assert not path.parent.exists()


def test_the_command_learns_what_fits_and_a_killed_one_goes_on(tiny_model, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {n} of a text that is long enough to be learnt from, again." for n in range(120)))
    dense, out = tiny_model(), tmp_path / "out"
    words = ["tune", dense, "-o", out, "--teacher", dense, "--data", text, "--length", "32", "--minutes"]
    monkeypatch.setattr(pace, "pace_of", lambda *_, **__: Pace(fixed_s=50.0, token_s=0.01))
    done = here(*words, "1")
    assert "  --minutes 1 is about 896 tokens here, 100 a second" in done.stderr and "the text has" not in done.stderr
    assert read_record(out)["tuning"]["tokens"] == 896 and not (tmp_path / ".out.tuning").exists()

    # what a killed run has left decides, not what the machine can do now
    KeptTokens(out, 2).write(640)
    done = here(*words, "2")
    assert "is about" not in done.stderr and read_record(out)["tuning"]["tokens"] == 640

    done = here(*words, "30")
    known = read_record(out)["tuning"]["tokens"]
    assert f"  the text has {known:,} tokens that may be learned: give more --data" in done.stderr
    assert 896 < known < 100 * (30 * 60 - 50) and json.loads((out / "saap.json").read_text())
    assert "--minutes 0.5 is too short" in refused(*words, "0.5")
    assert "--tokens is for a run without --minutes" in refused(*words, "1", "--tokens", "2048")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--minutes is for one process: give --tokens" in refused(*words, "1")
