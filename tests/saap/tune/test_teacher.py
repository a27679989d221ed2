import os

import pytest

pytest.importorskip("transformers")
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from saap.base.errors import UserError
from saap.base.store import Store
from saap.models.checkpoint import load_model
from saap.models.streaming import open_model
from saap.tune import teacher as teacher_module
from saap.tune.losses import bucket_shares, learning_loss
from saap.tune.teacher import Question, check_same_vocabulary, teacher_targets

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(300, (70, 12), generator=GENERATOR)
EVERYWHERE = torch.ones(2, 5, dtype=torch.bool)


def drawn(*shape, dtype=torch.float64, spread=2.0):
    return spread * torch.randn(*shape, generator=GENERATOR, dtype=dtype)


def likeliest(logits, k):
    values, tokens = logits.log_softmax(-1).topk(k)
    return tokens, values


def divergence(student, tokens, logprobs, mask=EVERYWHERE):
    """Mean KL to a teacher's likeliest tokens over some places: the loss without its NLL."""
    places = student[mask]
    labels = torch.zeros(len(places), dtype=torch.int64)
    return learning_loss(places, labels, (tokens[mask], logprobs[mask]), 1.0) / len(places)


def full_divergence(student, teacher):
    logs = (logits.log_softmax(-1).flatten(0, 1) for logits in (student, teacher))
    return F.kl_div(*logs, log_target=True, reduction="batchmean")


def test_extreme_logits_and_low_precision_stay_finite():
    teacher = drawn(2, 5, 30, dtype=torch.float32)
    tokens, logprobs = likeliest(teacher, 4)
    sure = torch.full((2, 5, 30), -300.0).scatter_(-1, tokens[..., :1], 300.0).requires_grad_()
    loss = divergence(sure, tokens, logprobs)
    loss.backward()
    assert loss.isfinite() and loss > 10 and sure.grad.isfinite().all()
    half = teacher.bfloat16().requires_grad_()
    other = likeliest(drawn(2, 5, 30, dtype=torch.float32), 4)
    loss = divergence(half, *other)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, divergence(half.float(), *other))
    loss.backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.abs().max() > 0


def test_at_most_one_tensor_of_the_logits_size_is_made():
    class Watch(TorchDispatchMode):
        """Memory of large results; what works in place makes none."""

        def __init__(self):
            super().__init__()
            self.made = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.numel() >= student.numel():
                self.made.add(found.data_ptr())
            return found

    student = drawn(10, 4000, dtype=torch.float32).requires_grad_()
    answers = likeliest(drawn(10, 4000, dtype=torch.float32), 8)
    with Watch() as forward:
        loss = learning_loss(student, torch.arange(10), answers, 0.5)
    (gradient,) = loss.grad_fn.saved_tensors
    assert forward.made - {student.data_ptr()} == {gradient.data_ptr()}
    with Watch() as backward:
        torch.autograd.grad(loss, student)
    assert len(backward.made - {gradient.data_ptr()}) == 1


def test_rounded_shares_sum_to_one():
    for k in (3, 50):
        _, logprobs = likeliest(drawn(4, 50), k)
        p, rest = bucket_shares(logprobs.half().float(), 50)
        assert torch.allclose(p.sum(-1) + rest, torch.ones(4), atol=1e-6) and (rest >= 0).all()
    p, rest = bucket_shares(torch.tensor([[-0.1, -1.0]]), 50)  # 1.27 together
    assert rest.item() == 0 and p.sum().item() == pytest.approx(1)


def test_the_cache_agrees_with_the_live_teacher(tiny_model):
    path, student = tiny_model(), load_model(tiny_model("other", seed=1))
    targets = teacher_targets(path, IDS, Question(k=24))
    assert (len(targets), targets.k) == (70, 24)
    with torch.inference_mode():
        live = load_model(path)(input_ids=IDS).logits[:, :-1]
        written = student(input_ids=IDS[20:50]).logits[:, :-1]
    tokens, logprobs = targets.batch(0, 70)
    assert tokens.shape == logprobs.shape == (70, 11, 24) and tokens.dtype == torch.int64
    exact = live.log_softmax(-1)
    assert torch.allclose(logprobs, exact.gather(-1, tokens), atol=5e-3)
    assert torch.allclose(logprobs, exact.topk(24).values, atol=5e-3)
    some = targets.batch(20, 50)  # across the border of a shard
    assert torch.equal(some[0], tokens[20:50]) and torch.equal(some[1], logprobs[20:50])
    mask = torch.ones(30, 11, dtype=torch.bool)
    cached = divergence(written, *some, mask)
    of_live = divergence(written, *likeliest(live[20:50], 24), mask)
    assert cached.item() == pytest.approx(of_live.item(), rel=1e-3)
    assert cached < full_divergence(written, live[20:50])
    for start, stop in ((0, 71), (3, 3), (-1, 2)):
        with pytest.raises(IndexError):
            targets.batch(start, stop)


def counted(monkeypatch):
    loads = []
    monkeypatch.setattr(
        teacher_module, "open_model", lambda path, device: loads.append(path) or open_model(path, device)
    )
    return loads


def test_a_killed_run_goes_on_and_a_finished_one_is_not_run_again(tiny_model, monkeypatch):
    path, loads, steps = tiny_model(), counted(monkeypatch), []

    def killed(label, done, total):
        steps.append((label, done, total))
        if done == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher_targets(path, IDS, Question(k=8), progress=killed)
    assert steps == [("asking the teacher (sequences), 8 likeliest tokens", done, 70) for done in (0, 32, 64)]
    (entry,) = Store("teacher", 0).folder.iterdir()
    first = {file.name: file.stat().st_mtime_ns for file in entry.iterdir()}
    assert len(first) == 2
    (entry / f"x.partial-{2**22 + 1}").write_bytes(b"of a process that was killed")
    targets = teacher_targets(path, IDS, Question(k=8))
    assert len(loads) == 2 and len(list(entry.iterdir())) == 3
    assert all((entry / name).stat().st_mtime_ns == time for name, time in first.items())
    tokens, logprobs = targets.batch(0, 70)
    again = teacher_targets(path, IDS, Question(k=8), progress=killed)
    assert len(loads) == 2 and len(steps) == 3 and torch.equal(again.batch(0, 70)[0], tokens)
    del targets, again
    (shard,) = entry.glob("00001-*")
    shard.write_bytes(shard.read_bytes()[:500])
    mended = teacher_targets(path, IDS, Question(k=8))
    assert len(loads) == 3 and torch.equal(mended.batch(0, 70)[1], logprobs)


def test_what_the_numbers_depend_on_is_in_the_key(tiny_model):
    path, other = tiny_model(), tiny_model("other", seed=1)
    entries = [
        teacher_targets(path, IDS, Question(k=8)),
        teacher_targets(other, IDS, Question(k=8)),
        teacher_targets(path, IDS, Question(k=9)),
        teacher_targets(path, IDS.flip(0), Question(k=8)),
        teacher_targets(path, IDS.view(140, 6), Question(k=8)),
        teacher_targets(path, IDS, Question(k=8, autocast=True)),
    ]
    assert len({one.directory for one in entries}) == len(entries)
    exact, rounded = entries[0].batch(0, 70)[1], entries[-1].batch(0, 70)[1]
    assert 0 < (exact - rounded).abs().max() < 0.2


def test_the_cache_is_bounded(tiny_model, monkeypatch):
    path = tiny_model()
    each = 70 * 11 * 10 * 4

    def targets(limit, shift=0, k=10):
        monkeypatch.setattr(teacher_module, "LIMIT_BYTES", limit)
        return teacher_targets(path, IDS.roll(shift, 1), Question(k=k))

    first, second = (targets(10 * each, shift).directory for shift in range(2))
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    assert targets(10 * each).directory == first  # used again
    third = targets(int(2.5 * each), 2).directory
    assert first.is_dir() and third.is_dir() and not second.exists()
    lowered = targets(each - 1)
    assert lowered.k == 9 and lowered.batch(0, 1)[0].shape == (1, 11, 9)
    assert not first.exists() and not third.exists()
    with pytest.raises(UserError, match="do not fit into 0 MB"):
        targets(70 * 11 * 4 - 1, k=64)


def test_refusals(tiny_model, tmp_path, monkeypatch):
    path = tiny_model()
    with pytest.raises(UserError, match="k 0 is not allowed"):
        teacher_targets(path, IDS, Question(k=0))
    with pytest.raises(UserError, match="cannot predict anything"):
        teacher_targets(path, IDS[:, :1])
    (tmp_path / "teacher").write_text("no directory")
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="set SAAP_CACHE to another place"):
        teacher_targets(path, IDS)


def test_vocabularies(tiny_model, tiny_tokenizer):
    path, other = tiny_model(), tiny_model("other", seed=1)
    check_same_vocabulary(path, other)
    with pytest.raises(UserError, match=r"tiny has 320 tokens and .*larger 384: a teacher must"):
        check_same_vocabulary(path, tiny_model("larger", vocab_size=384))
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    assert '"a"' in text
    (other / "tokenizer.json").write_text(text.replace('"!":', '"\u20ac":'), encoding="utf-8")
    with pytest.raises(UserError, match=r"tiny and .*other have tokenizers that differ \(token \d+, '!', first\)"):
        check_same_vocabulary(path, other)
