from dataclasses import replace

import pytest
from support.fit_models import MB, PI4, PI5, SMOL, SMOL8, SMOL32, X86

from devices.fit.fitting import Finding, fit, prune_to, with_bits
from devices.fit.memory import (
    PIECE,
    RUNTIME_BYTES,
    SYSTEM_BYTES,
    Device,
    Model,
    largest_context,
    memory_of,
    packed_share,
    read_share,
    usable_memory,
)
from devices.probe.cpu import FEATURES
from devices.profiles.profile import DeviceError
from export.bundle.manifest import PREFILL_CHUNK
from saap.models.slim_quant import MatrixForm
from saap.quantize.bundle_size import matrix_bytes


def test_memory_by_hand() -> None:
    """A block of 32 weights: 16 bytes of integers, a scale of 4 and, packed, a sum of 4: 24 for 20."""
    memory = memory_of(SMOL, PI5, context=1000)
    assert (memory.runtime, memory.cache) == (68 * MB, 46_080_000)
    assert memory.weights == pytest.approx(84_190_464 * 24 / 20, abs=1)
    assert memory.work == round(1.9 * 4 * (2 * 576 + 3 * 1536)) * 256
    assert memory.total == 68_000_000 + 101_028_557 + 46_080_000 + 11_206_656


@pytest.mark.parametrize(
    ("model", "device", "share"),
    [
        (SMOL, PI5, 24 / 20),
        (SMOL, PI4, 16 / 20),  # float kernels pack the integers and read the scales from the file
        (replace(SMOL, accuracy_level=0), PI5, 16 / 20),
        (replace(SMOL, block=128), PI5, (64 + 4 + 4) / (64 + 4)),
        (SMOL8, PI5, (32 + 4 + 4) / (32 + 4)),
        (SMOL32, PI5, 1.0),
        (replace(SMOL32, bits=16), PI5, 1.0),
    ],
)
def test_packed_weights_by_hand(model: Model, device: Device, share: float) -> None:
    assert packed_share(model, device) == pytest.approx(share)


def test_activations_are_of_one_piece() -> None:
    """As generation reads a prompt, and of no more than the context."""
    assert PIECE == PREFILL_CHUNK
    assert memory_of(SMOL, PI5, 100).work == 43_776 * 100
    assert memory_of(SMOL, PI5, PIECE).work == memory_of(SMOL, PI5, 4000).work == 43_776 * 256
    # Without a feed-forward block: residual and norm, and queries, keys and values of 15 heads of 64, twice.
    assert memory_of(replace(SMOL, widest_ffn=0), PI5, 100).work == round(1.9 * 4 * (2 * 576 + 2 * 15 * 64)) * 100
    # Standard operators hold the cache twice.
    assert memory_of(replace(SMOL, target="portable"), PI5, 100).cache == 2 * memory_of(SMOL, PI5, 100).cache


def test_largest_context_is_the_edge() -> None:
    fixed = 68_000_000 + 101_028_557
    token = 46_080
    fixed += 43_776 * 256
    edge = replace(PI5, memory_bytes=fixed + 500 * token)
    assert largest_context(SMOL, edge) == 500
    assert largest_context(SMOL, replace(edge, memory_bytes=edge.memory_bytes - 1)) == 499
    assert largest_context(SMOL, replace(edge, memory_bytes=fixed - 43_776 * 256)) == 0
    assert largest_context(SMOL, PI5) == 8192  # the model's own end
    assert fit(SMOL, edge, 500).fits and not fit(SMOL, edge, 501).fits
    limits = [largest_context(SMOL, replace(PI5, memory_bytes=size * MB)) for size in range(100, 1200, 50)]
    assert limits == sorted(limits) and limits[0] == 0 and limits[-1] == 8192


def test_ceiling_by_hand() -> None:
    found = fit(SMOL, PI5, 1000)
    read = 84_190_464 * 18 / 20  # scales of 16 bits
    assert found.ceiling[0] == pytest.approx(17.1e9 / read)
    assert found.ceiling[1] == pytest.approx(17.1e9 / (read + 46_080_000))


def test_bytes_that_are_read_by_hand() -> None:
    """Of four bits with a float scale for 32: 20 bytes in the file."""
    assert read_share(SMOL, X86) == pytest.approx(24 / 20)
    assert read_share(replace(SMOL, block=128), X86) == pytest.approx((64 + 4 + 4) / (64 + 4))
    assert read_share(SMOL8, PI5) == read_share(SMOL8, X86) == pytest.approx((32 + 4 + 4) / (32 + 4))
    assert read_share(SMOL, PI5) == pytest.approx(18 / 20)
    assert read_share(SMOL, PI4) == read_share(replace(SMOL, accuracy_level=0), X86) == read_share(SMOL32, X86) == 1


def test_ceiling_that_is_not_known_says_why() -> None:
    cached = fit(SMOL, replace(PI5, last_level_cache=64 << 20), 100)
    assert cached.ceiling == (None, None) and any("from a cache of 67 MB" in line for line in cached.remarks)
    unknown = fit(SMOL, replace(PI5, bandwidth=None, bandwidth_source="measure it"), 100)
    assert unknown.ceiling == (None, None) and any("(measure it)" in line for line in unknown.remarks)


def test_8_bit_is_refused_without_dotprod() -> None:
    found = fit(SMOL8, PI4, 100)
    assert not found.loads and not found.fits
    assert [finding.what for finding in found.refusals] == ["8 bit has no kernel without dotprod"]
    assert Finding("so that it loads", "saap export MODEL -o BUNDLE --bits 4 --no-dotprod") in found.remedies
    assert fit(SMOL8, PI5, 100).loads and fit(SMOL8, X86, 100).loads
    unknown = fit(SMOL8, replace(PI5, isa=frozenset({"asimd"}), lacks=frozenset()), 100)
    assert unknown.loads and any("whether the CPU has it is not known" in line for line in unknown.remarks)


def test_4_bit_without_dotprod_runs_in_float32_and_says_so() -> None:
    found = fit(SMOL, PI4, 100)
    assert found.fits and any("computed in float32" in line for line in found.remarks)


@pytest.mark.parametrize(
    ("installed", "needed", "loads"),
    [
        ("1.23.2", "1.23", True), ("1.19.2", "1.23", False), ("1.9.0", "1.23", False), ("2.0.0", "1.27", True),
        (None, "1.23", True),
    ],
)  # fmt: skip
def test_versions_of_onnxruntime(installed: str | None, needed: str, loads: bool) -> None:
    found = fit(replace(SMOL, onnxruntime_min=needed), replace(PI5, onnxruntime=installed), 100)
    assert found.loads is loads


def test_an_int8_cache_on_jetpack_6_is_what_is_too_new() -> None:
    model = replace(SMOL, kv_dtype="int8", kv_bytes_per_token=11_520, onnxruntime_min="1.27")
    found = fit(model, replace(PI5, onnxruntime="1.23.2"), 100)
    assert "needs ONNX Runtime 1.27, there it is 1.23.2" in found.refusals[0].what
    assert found.refusals[0].command == "saap export MODEL -o BUNDLE --kv 32"


def test_cuda() -> None:
    model = replace(SMOL, target="cuda", accuracy_level=0, kv_dtype="float16", kv_bytes_per_token=23_040)
    assert fit(model, PI5, 100).refusals[0].command == "saap export MODEL -o BUNDLE --target cpu"
    orin = fit(model, replace(PI5, cuda="sm_87"), 100)
    assert orin.loads and any("no kernels for sm_87" in line for line in orin.remarks)
    assert any("slow path" in line for line in orin.remarks)  # nine query heads to three: a ratio of 3
    even = replace(model, attention=((8, 2),) * 30)
    assert not any("slow path" in line for line in fit(even, replace(PI5, cuda="sm_87"), 100).remarks)


def test_remedies_make_it_fit() -> None:
    """Each of them, followed, gives a bundle that fits."""
    device = replace(PI5, memory_bytes=600 * MB)
    found = fit(SMOL32, device, 2000)
    assert not found.fits and found.loads
    commands = [finding.command for finding in found.remedies]
    assert found.largest_context == 0 and not any("--context" in str(command) for command in commands)
    for bits in (8, 4):
        assert f"saap export MODEL -o BUNDLE --bits {bits}" in commands
        assert fit(with_bits(SMOL32, bits), device, 2000).fits
    size = prune_to(SMOL32, device, 2000)
    assert size and f"saap prune MODEL -o SLIM --max-bytes {size // MB}MB --bits 32" in commands
    looked_up = SMOL32.file_bytes - SMOL32.weight_bytes_per_token  # which pruning leaves
    pruned = replace(SMOL32, file_bytes=size, weight_bytes_per_token=size - looked_up)
    assert fit(pruned, device, 2000).fits
    more = replace(pruned, weight_bytes_per_token=pruned.weight_bytes_per_token + 2 * MB)
    assert not fit(more, device, 2000).fits  # it does not ask for more pruning than needed


def test_remedies_of_a_long_context() -> None:
    device = replace(PI5, memory_bytes=240 * MB)
    found = fit(SMOL, device, 4000)
    assert not found.fits
    commands = [finding.command for finding in found.remedies]
    assert f"saap generate BUNDLE --context {found.largest_context}" in commands
    assert fit(SMOL, device, found.largest_context).fits
    kv8 = "saap export MODEL -o BUNDLE --bits 4 --kv 8"
    assert kv8 in commands
    assert kv8 not in [f.command for f in fit(SMOL, replace(device, onnxruntime="1.23.2"), 4000).remedies]
    assert kv8 not in [f.command for f in fit(SMOL, replace(device, memory_bytes=220 * MB), 4000).remedies]


def test_only_a_device_with_dotprod_is_sent_to_8_bit() -> None:
    commands = [f.command for f in fit(SMOL32, replace(PI4, memory_bytes=600 * MB), 2000).remedies]
    assert "saap export MODEL -o BUNDLE --bits 4" in commands
    assert "saap export MODEL -o BUNDLE --bits 8" not in commands
    host = replace(X86, lacks=FEATURES - X86.isa, memory_bytes=450 * MB)  # it lacks dotprod by name only
    assert "saap export MODEL -o BUNDLE --bits 8" in [f.command for f in fit(SMOL32, host, 1000).remedies]


def test_nothing_helps_where_the_runtime_alone_is_too_large() -> None:
    found = fit(SMOL, replace(PI5, memory_bytes=RUNTIME_BYTES), 100)
    assert not found.fits and found.largest_context == 0 and found.remedies == ()


def test_a_tight_fit_is_called_so() -> None:
    need = memory_of(SMOL, PI5, 100).total
    assert any("tight" in line for line in fit(SMOL, replace(PI5, memory_bytes=need), 100).remarks)
    assert not any("tight" in line for line in fit(SMOL, replace(PI5, memory_bytes=2 * need), 100).remarks)


def test_bits_scale_as_the_exporter_packs_them() -> None:
    ratio = sum(matrix_bytes(576, 576, MatrixForm(8, 32))) / sum(matrix_bytes(576, 576, MatrixForm(4, 32)))
    assert with_bits(SMOL8, 4).weight_bytes_per_token == round(SMOL8.weight_bytes_per_token / ratio)
    assert with_bits(SMOL32, 4).weight_bytes_per_token == pytest.approx(SMOL.weight_bytes_per_token, rel=0.01)


@pytest.mark.parametrize("context", [0, 8193])
def test_a_context_that_the_model_does_not_have(context: int) -> None:
    with pytest.raises(DeviceError, match="tokens"):
        fit(SMOL, PI5, context)


def test_memory_of_a_board_by_hand() -> None:
    gib = 1 << 30
    assert usable_memory({"memory_visible": 7620 << 20, "memory_capacity": 8 * gib}) == (
        (7620 - 775) << 20,
        "the 7.44 GiB that its system sees (7990 MB), less 813 MB for the system",
    )
    assert usable_memory({"memory_capacity": 16 * gib})[0] == round(0.93 * 16 * gib) - SYSTEM_BYTES
    smallest = usable_memory({"memory_capacity": None, "memory_smallest": gib})
    assert smallest == (round(0.93 * gib) - round(0.25 * 0.93 * gib), smallest[1])
    assert "smallest that is sold" in smallest[1]
    assert usable_memory({"memory_visible": gib}, stated=4 * gib)[0] == round(0.93 * 4 * gib) - SYSTEM_BYTES
    assert usable_memory({"memory_capacity": None}) is None


@pytest.mark.parametrize(("bandwidth", "sustained"), [(17.1e9, None), (17.1e9, 5e9), (None, 5e9)])
def test_sustained_rates_are_the_ceiling_of_that_bandwidth(bandwidth: float | None, sustained: float | None) -> None:
    verdict = fit(SMOL, replace(PI5, bandwidth=bandwidth, sustained=sustained), context=1000)
    known = bandwidth is not None and sustained is not None
    expected = fit(SMOL, replace(PI5, bandwidth=sustained), context=1000).ceiling if known else (None, None)
    assert verdict.sustained == (pytest.approx(expected) if known else expected)
