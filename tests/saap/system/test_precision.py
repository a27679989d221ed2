"""bfloat16 where it is faster; float32 by oneDNN on AMD's processors, while it stays float32 and no longer."""

import pytest
import torch

from saap.system import precision
from saap.system.precision import autocast_dtype, computes_bf16, fast_float32

AMD = "processor : 0\nvendor_id\t: AuthenticAMD\nflags\t: fpu avx2 avx512f\n"
INTEL = AMD.replace("AuthenticAMD", "GenuineIntel")


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Write what the system says of its processor."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this torch has no MKL and oneDNN")

    def write(text):
        (tmp_path / "cpuinfo").write_text(text)
        return tmp_path / "cpuinfo"

    return write


def inside(path):
    with fast_float32(path):
        return torch.get_float32_matmul_precision()


def test_on_amd_inside_the_block_only(cpuinfo, monkeypatch):
    monkeypatch.setattr(precision, "_stays_float32", lambda: True)
    assert inside(cpuinfo(AMD)) == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError), fast_float32(cpuinfo(AMD)):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("text", [INTEL, AMD.replace("avx2", "amx_bf16"), "Processor : ARMv8\n", ""])
def test_elsewhere_nothing_changes(cpuinfo, text, monkeypatch):
    monkeypatch.setattr(precision, "_stays_float32", lambda: pytest.fail("was tried"))
    assert inside(cpuinfo(text)) == "highest"
    assert inside(cpuinfo(AMD).with_name("none")) == "highest"


def test_a_product_that_is_rounded_takes_it_back(cpuinfo, monkeypatch):
    whole = torch.nn.functional.linear

    def rounded(x, weight):
        if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            return whole(x.bfloat16(), weight.bfloat16()).float()
        return whole(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", rounded)
    assert inside(cpuinfo(AMD)) == "highest"


def test_the_users_own_choice_stays(cpuinfo, monkeypatch):
    monkeypatch.setattr(precision, "_stays_float32", lambda: pytest.fail("was tried"))
    torch.set_float32_matmul_precision("high")
    try:
        assert inside(cpuinfo(AMD)) == "high" == torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_here_products_are_as_exact_as_without():
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(64, 576, generator=generator), torch.randn(1536, 576, generator=generator)
    expected = x.double() @ weight.double().t()
    with fast_float32():
        error = (torch.nn.functional.linear(x, weight) - expected).abs().max() / expected.abs().max()
    assert error <= 5e-6


def test_a_product_is_timed_and_random_numbers_stay():
    state = torch.get_rng_state()
    assert 1e6 < precision.product_rate(64, 64, 128, torch.float32, torch.device("cpu"), 0.001) < 1e14
    assert torch.equal(torch.get_rng_state(), state)


def test_what_bfloat16_gains_is_a_ratio_of_two_rates_and_measured_once(monkeypatch):
    asked = []
    rates = {torch.bfloat16: 3e9, torch.float32: 2e9}
    monkeypatch.setattr(precision, "product_rate", lambda *sizes: asked.append(sizes[3]) or rates[sizes[3]])
    precision.bf16_gain.cache_clear()
    try:
        assert precision.bf16_gain() == precision.bf16_gain() == 1.5
        assert asked == [torch.bfloat16, torch.float32]
    finally:
        precision.bf16_gain.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16\nbugs\t\t: none\nflags\t\t: fpu avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("flags\t\t: fpu avx2\n", False),
        ("Features\t: fp asimd bf16\nFeatures\t: fp asimd\n", False),  # one kind of core has it, the other has not
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("processor : 0\n", False),
    ],
)
def test_bf16_is_taken_where_the_cpu_has_it_and_gains_by_it(tmp_path, monkeypatch, text, expected):
    path = tmp_path / "cpuinfo"
    path.write_text(text, encoding="utf-8")
    cpu = torch.device("cpu")
    assert computes_bf16(cpu, path) is expected
    assert not computes_bf16(cpu, tmp_path / "missing")
    monkeypatch.setattr("saap.system.precision.computes_bf16", lambda device: expected)
    for gain in (0.5, 1.1, 1.3):  # an Intel core has it and is slower by it
        monkeypatch.setattr("saap.system.precision.bf16_gain", lambda gain=gain: gain)
        assert autocast_dtype("auto", cpu) == (torch.bfloat16 if expected and gain == 1.3 else None)
    assert autocast_dtype("fp32", cpu) is None and autocast_dtype("bf16", cpu) is torch.bfloat16
