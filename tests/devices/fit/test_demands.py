"""What a device of a profile demands of a bundle."""

from dataclasses import replace

import pytest
from support.fit_models import SMOL, SMOL32

from devices.fit.demands import CONTEXT, DeviceOptions, demands_of
from devices.fit.fitting import size_option
from saap.base.errors import UserError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "dotprod", "bits"),
    [
        ("raspberry-pi-4", False, (4,)), ("raspberry-pi-5", True, (4, 8)), ("intel-n100-ddr5", True, (4, 8)),
    ],
)  # fmt: skip
def test_a_processor_demands_what_it_has_kernels_for(name: str, dotprod: bool, bits: tuple[int, ...]) -> None:
    demands = demands_of(name, DeviceOptions(memory=4 * GIB))
    assert (demands.dotprod, demands.bits) == (dotprod, bits)
    demands.check_bits(4, "--bits 4")
    if not dotprod:
        with pytest.raises(UserError, match=r"^--bits 8 has no kernel on Raspberry Pi 4, which lacks dotprod: give 4$"):
            demands.check_bits(8, "--bits 8")


def test_what_is_said_of_a_device_counts_more_than_its_profile() -> None:
    known, said = (
        demands_of("raspberry-pi-5", options)
        for options in (DeviceOptions(), DeviceOptions(memory=8 * GIB, onnxruntime="1.24.1", context=100))
    )
    assert said.device.memory_bytes > 4 * known.device.memory_bytes  # 2 GiB is the smallest that is sold
    assert (known.device.onnxruntime, said.device.onnxruntime) == ("1.32.0", "1.24.1")
    assert (known.judge(SMOL).context, said.judge(SMOL).context) == (CONTEXT, 100)
    assert known.judge(replace(SMOL, context_length=512)).context == 512
    assert demands_of("rk3588", DeviceOptions(memory=8 * GIB)).device.big_cores == 4


def test_a_file_of_the_largest_size_fits_and_a_larger_one_does_not() -> None:
    demands = demands_of("raspberry-pi-4", DeviceOptions(memory=1 * GIB, context=8000))
    most = demands.largest_file(SMOL32)
    assert 0 < most < SMOL32.file_bytes
    looked_up = SMOL32.file_bytes - SMOL32.weight_bytes_per_token
    for size, fits in ((most, True), (most + 10, False)):
        model = replace(SMOL32, file_bytes=size, weight_bytes_per_token=size - looked_up)
        assert demands.judge(model).fits is fits
    assert demands_of("raspberry-pi-4", DeviceOptions(memory=100 << 20)).largest_file(SMOL32) <= 0


def test_sizes_as_options_take_them() -> None:
    sizes = (217_999, 9_000_000, 9_217_400, 10_999_999, 87_000_000)
    assert list(map(size_option, sizes)) == ["217kB", "9MB", "9217kB", "10MB", "87MB"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("raspbery-pi-5", DeviceOptions(), "no device 'raspbery-pi-5': is it raspberry-pi-5 or raspberry-pi-4"),
        ("", DeviceOptions(), "no device '': choose one of generic-arm64, "),
        ("rk3588", DeviceOptions(), "how much memory rk3588 has is not known: say it with --memory"),
        ("rk3588", DeviceOptions(onnxruntime="new"), "'new' is no version of ONNX Runtime"),
    ],
)
def test_mistakes(name: str, options: DeviceOptions, message: str) -> None:
    with pytest.raises(UserError) as caught:
        demands_of(name, options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
