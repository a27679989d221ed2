from devices.probe.cpu import core_name, core_of_midr
from saap.base.tree import cpu_list, parse_cpu_list


def test_cores_are_named_by_their_numbers() -> None:
    assert core_name({"CPU implementer": "0x41", "CPU part": "0xd4f"}) == "Neoverse-V2"
    assert core_name({"CPU implementer": "0x41", "CPU part": "0xfff"}) == "ARM implementer 0x41 part 0xfff"
    assert core_name({"CPU implementer": "?", "CPU part": "0xd4f"}) is None
    assert core_of_midr("0x00000000410fd421\n") == "Cortex-A78AE"
    assert core_of_midr("0x00000000414fd0b1") == "Cortex-A76"
    assert core_of_midr("0x000000004e0f0040") == "Carmel"
    assert core_of_midr(None) is None and core_of_midr("none") is None


def test_cpu_lists() -> None:
    assert parse_cpu_list("0-3,6") == [0, 1, 2, 3, 6]
    assert parse_cpu_list("0 1 4") == [0, 1, 4]
    assert parse_cpu_list("2") == [2]
    assert parse_cpu_list("\n") == [] and parse_cpu_list("a-b") == []
    assert cpu_list([6, 0, 1, 2, 3]) == "0-3,6"
