import json
import platform
from pathlib import Path

import pytest
from support import fake_trees
from support.fake_trees import A76_ON, CPU, arm_cpu, plant

from bench.judge.comparison import device_differs
from devices.probe.host import fingerprint, probe, run_here
from devices.profiles.profile import load_profiles, profile_of
from saap.base.tree import parse_cpu_list

A76 = ["asimd", "dotprod", "fp16"]
THOR = ["asimd", "bf16", "dotprod", "fp16", "i8mm", "sve", "sve2"]

# tree, profile, cores, isa, memory in kB, (cpus, core, capacity, highest clock as set in MHz) of each cluster,
# power mode, JetPack
BOARDS = [
    ("raspberry_pi_4", "raspberry-pi-4", "Cortex-A72", ["asimd"], 3884304,
     [("0-3", "Cortex-A72", None, 1800)], None, None),
    ("raspberry_pi_5", "raspberry-pi-5", "Cortex-A76", A76, 8256512,
     [("0-3", "Cortex-A76", None, 2400)], None, None),
    ("rk3588", "rk3588", "Cortex-A55 + Cortex-A76", A76, 16214912,
     [("0-3", "Cortex-A55", 397, 1800), ("4-5", "Cortex-A76", 1024, 2400), ("6-7", "Cortex-A76", 1024, 2256)],
     None, None),
    ("orin_nano", "jetson-orin-nano-super", "Cortex-A78AE", A76, 7802880,
     [("0-3", "Cortex-A78AE", None, 1344), ("4-5", "Cortex-A78AE", None, 1344)],
     {"name": "25W", "id": 1}, "6.2.1"),
    ("orin_nx", "jetson-orin-nx", "Cortex-A78AE", A76, 15972352,
     [("0-3", "Cortex-A78AE", None, 1420.8), ("6-7", "Cortex-A78AE", None, 1420.8)],
     {"name": "15W", "id": 2}, "7.2"),
    ("agx_orin", "jetson-agx-orin", "Cortex-A78AE", A76, 64349184,
     [(cpus, "Cortex-A78AE", None, 2201.6) for cpus in ("0-3", "4-7", "8-11")],
     {"name": "MAXN", "id": 0}, "6.2.1"),
    ("xavier_nx", "jetson-xavier-nx", "Carmel", ["asimd", "fp16"], 7015424,
     [(cpus, "Carmel", None, 1420.8) for cpus in ("0-1", "2-3", "4-5")],
     {"name": "MODE_15W_6CORE", "id": 2}, "5.1.2"),
    ("nano", "jetson-nano", "Cortex-A57", ["asimd"], 4059376,
     [("0-3", "Cortex-A57", None, 1479)], None, "4.6.1"),
    ("thor", "jetson-agx-thor", "Neoverse-V3AE", THOR, 128830464,
     [(f"{n}-{n + 1}", "Neoverse-V3AE", None, 2601) for n in range(0, 14, 2)],
     {"name": "120W", "id": 1}, "7.0"),
]  # fmt: skip


def tree(name: str, where: Path) -> Path:
    return plant(where / name, getattr(fake_trees, name)())


@pytest.fixture
def raspberry_pi_5(tmp_path: Path) -> Path:
    return tree("raspberry_pi_5", tmp_path)


@pytest.fixture
def x86_vm(tmp_path: Path) -> Path:
    return tree("x86_vm", tmp_path)


@pytest.mark.parametrize(("name", "profile", "cpu", "isa", "memory_kb", "clusters", "mode", "system"), BOARDS)
def test_boards(tmp_path: Path, name, profile, cpu, isa, memory_kb, clusters, mode, system) -> None:
    facts = probe(tree(name, tmp_path))
    assert facts["cpu_model"] == cpu and facts["architecture"] == "aarch64" and facts["isa"] == isa
    assert facts["memory_bytes"] == memory_kb * 1024
    found = [(c["cpus"], c["core"], c["capacity"], c["max_hz"] / 1e6) for c in facts["clusters"]]
    assert found == clusters
    assert (facts["power_mode"], facts["jetpack"]) == (mode, system)
    count = sum(len(parse_cpu_list(c["cpus"])) for c in facts["clusters"])
    assert (facts["cores"]["physical"], facts["cores"]["logical"]) == (count, count)
    assert profile_of(facts["compatible"], load_profiles()) == profile
    assert all(facts[key] is None and why for key, why in facts["unknown"].items())
    json.dumps(facts)


def test_every_fact_that_is_none_has_a_reason(tmp_path: Path) -> None:
    for root in (tmp_path / "empty", tree("x86_vm", tmp_path), tree("thor", tmp_path)):
        facts = probe(root)
        assert {name for name, value in facts.items() if value is None} == set(facts["unknown"])


def test_raspberry_pi_5(raspberry_pi_5: Path) -> None:
    facts = probe(raspberry_pi_5)
    assert facts["board"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert facts["compatible"] == ["raspberrypi,5-model-b", "brcm,bcm2712"]
    assert facts["cores"] == {"physical": 4, "logical": 4, "allowed": 4, "offline": 0}
    assert facts["last_level_cache_bytes"] == 2 << 20
    assert facts["governor"] == "ondemand"
    (cluster,) = facts["clusters"]
    assert (cluster["min_hz"], cluster["max_hz"], cluster["current_hz"]) == (
        1_500_000_000,
        2_400_000_000,
        1_500_000_000,
    )
    assert facts["os"] == "Debian GNU/Linux 12 (bookworm)"
    assert facts["kernel"] == "6.6.31+rpt-rpi-2712"


def test_x86_virtual_machine_in_a_cgroup(x86_vm: Path) -> None:
    facts = probe(x86_vm)
    assert facts["board"] == "QEMU"
    assert facts["architecture"] == "x86_64"
    assert facts["isa"] == ["avx2", "avx512_vnni", "avx512f", "avx_vnni", "f16c", "fma"]
    assert facts["cores"] == {"physical": 1, "logical": 2, "allowed": 1, "offline": None}
    assert facts["last_level_cache_bytes"] == 1 << 20  # CPU 0's own cache is out of reach
    assert facts["memory_bytes"] == 1 << 30
    assert facts["governor"] is None and facts["kernel"] is None
    assert [c["core"] for c in facts["clusters"]] == ["Intel(R) Xeon(R) Processor @ 2.60GHz"]


def test_cgroup_version_1_limit(x86_vm: Path) -> None:
    plant(
        x86_vm,
        {
            "proc/self/cgroup": "4:cpu,memory:/job\n1:cpuset:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "536870912\n",
        },
    )
    assert probe(x86_vm)["memory_bytes"] == 512 << 20


def test_features_of_a_mixed_soc_are_those_of_its_smallest_core(raspberry_pi_5: Path) -> None:
    big = arm_cpu(1, 0xD44, A76_ON + " i8mm")
    plant(raspberry_pi_5, {"proc/cpuinfo": arm_cpu(0, 0xD0B, A76_ON) + "\n" + big})
    facts = probe(raspberry_pi_5)
    assert facts["cpu_model"] == "Cortex-A76 + Cortex-X1"
    assert facts["isa"] == ["asimd", "dotprod", "fp16"]


def test_generations_of_one_name_are_told_apart(x86_vm: Path) -> None:
    plain = (x86_vm / "proc/cpuinfo").read_text()
    assert probe(x86_vm)["cpu_model"] == "Intel(R) Xeon(R) Processor @ 2.60GHz"
    found = []
    for model in (106, 143):
        numbered = plain.replace("model name", f"cpu family\t: 6\nmodel\t\t: {model}\nmodel name")
        found.append(probe(plant(x86_vm, {"proc/cpuinfo": numbered})))
    names = [facts["cpu_model"] for facts in found]
    assert names == [f"Intel(R) Xeon(R) Processor @ 2.60GHz (family 6, model {model})" for model in (106, 143)]
    assert found[0]["fingerprint"] != found[1]["fingerprint"]
    assert "model 106" in str(device_differs(*found))


def test_a_kernel_that_prints_no_part_has_its_id_register(raspberry_pi_5: Path) -> None:
    midr = {f"{CPU}/cpu{n}/regs/identification/midr_el1": "0x00000000414fd0b1\n" for n in range(4)}
    plant(raspberry_pi_5, {"proc/cpuinfo": "\n".join(f"processor\t: {n}\n" for n in range(4)), **midr})
    facts = probe(raspberry_pi_5)
    assert facts["cpu_model"] == "Cortex-A76"
    assert [(c["cpus"], c["core"]) for c in facts["clusters"]] == [("0-3", "Cortex-A76")]
    assert facts["isa"] is None


def test_cores_that_are_off(tmp_path: Path) -> None:
    cores = probe(tree("orin_nx", tmp_path))["cores"]
    assert (cores["logical"], cores["offline"]) == (6, 2)


def test_each_cpu_with_a_clock_of_its_own_is_one_cluster(x86_vm: Path) -> None:
    for n in range(2):
        plant(x86_vm, fake_trees.policy([n], "powersave", 800000, 3400000, 800000 + n))
    assert [(c["cpus"], c["current_hz"]) for c in probe(x86_vm)["clusters"]] == [("0-1", 800_000_000)]


def test_numa_nodes(x86_vm: Path) -> None:
    node = "sys/devices/system/node/node0"
    plant(x86_vm, {f"{node}/cpulist": "0-1\n", f"{node}/meminfo": "Node 0 MemTotal:       16000000 kB\n"})
    assert probe(x86_vm)["numa"] == [{"cpus": "0-1", "memory_bytes": 16384000000}]


def test_empty_tree_is_unknown_not_zero(tmp_path: Path) -> None:
    facts = probe(tmp_path)
    unknown = {name for name, value in facts.items() if value is None}
    assert unknown >= {"board", "cpu_model", "architecture", "isa", "last_level_cache_bytes", "memory_bytes", "os"}
    assert facts["cores"] == {"physical": None, "logical": None, "allowed": None, "offline": None}
    assert len(facts["fingerprint"]) == 16


def test_what_may_not_be_read_is_unknown_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree("orin_nano", tmp_path)
    read = Path.read_bytes

    def guarded(path: Path) -> bytes:
        if path.name in ("status", "nvpmodel.conf", "model", "scaling_governor"):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    facts = probe(root)
    assert facts["power_mode"] is None
    assert "var/lib/nvpmodel/status cannot be read (Permission denied)" in facts["unknown"]["power_mode"]
    assert facts["board"] is None and "model cannot be read" in facts["unknown"]["board"]


@pytest.mark.parametrize("garbage", ["", "\0\0", "x" * 5000, "-1\n", "0x", "processor\nprocessor\t: x\n", "9" * 5000])
def test_garbage_never_raises(tmp_path: Path, garbage: str) -> None:
    for name in ("orin_nano", "x86_vm"):
        files = {path: garbage for path in getattr(fake_trees, name)() if "cgroup" not in path}
        json.dumps(probe(plant(tmp_path / name, files)))


def test_fingerprint_survives_a_reboot_and_sees_a_governor(raspberry_pi_5: Path) -> None:
    before = probe(raspberry_pi_5)
    policy = "sys/devices/system/cpu/cpufreq/policy0"
    plant(
        raspberry_pi_5,
        {
            "proc/meminfo": "MemTotal:        8255900 kB\n",
            f"{policy}/scaling_cur_freq": "2400000\n",
            f"{policy}/scaling_max_freq": "1500000\n",  # what a thermal cap does
            "proc/self/status": "Cpus_allowed_list:\t0-1\n",
            "sys/class/thermal/thermal_zone0/temp": "81000\n",
            "proc/sys/kernel/osrelease": "6.6.32+rpt-rpi-2712\n",
        },
    )
    assert probe(raspberry_pi_5)["fingerprint"] == before["fingerprint"]
    plant(raspberry_pi_5, {f"{policy}/scaling_governor": "performance\n"})
    assert probe(raspberry_pi_5)["fingerprint"] != before["fingerprint"]
    assert fingerprint({**before, "onnxruntime": "0.0"}) != before["fingerprint"]


def test_fingerprint_sees_jetson_clocks_and_the_fan(tmp_path: Path) -> None:
    """A reboot loses both; a baseline that does not say is told so."""
    free = plant(tmp_path / "free", fake_trees.orin_nano())
    gpu, policy = "sys/class/devfreq/17000000.gpu", "sys/devices/system/cpu/cpufreq/policy"
    limits = {f"{gpu}/min_freq": "306000000\n", f"{gpu}/max_freq": "918000000\n"}
    cool = {
        "var/lib/nvpmodel/status": "pmode:0001 fmode:fanNull",
        "etc/nvfancontrol.conf": "FAN_DEFAULT_PROFILE cool\n",
    }
    fixed = {f"{policy}{n}/scaling_min_freq": "1344000\n" for n in (0, 4)} | limits
    fixed |= {f"{gpu}/min_freq": "918000000\n", "sys/kernel/debug/bpmp/debug/clk/emc/mrq_rate_locked": "1\n"}
    trees = {"free": limits, "fixed": fixed, "cool": limits | cool}
    told = {name: probe(plant(tmp_path / name, fake_trees.orin_nano() | tree)) for name, tree in trees.items()}
    assert told["free"]["clocks"] == {"cpu": False, "gpu": False, "emc": None, "fan": "quiet"}
    assert told["fixed"]["clocks"] == {"cpu": True, "gpu": True, "emc": True, "fan": "quiet"}
    assert told["cool"]["clocks"] == {"cpu": False, "gpu": False, "emc": None, "fan": "cool"}
    assert len({facts["fingerprint"] for facts in told.values()}) == 3
    assert probe(plant(tmp_path / "pi", fake_trees.raspberry_pi_5()))["clocks"] is None
    before = {name: fact for name, fact in probe(free).items() if name != "clocks"}
    told_then = {**before, "fingerprint": fingerprint(before)}
    differs = device_differs(told_then, probe(free))
    assert differs and "does not say whether jetson_clocks was on" in differs
    assert "clocks CPU no" in str(device_differs(told["free"], told["fixed"]))


def test_fingerprint_sees_power_mode_and_release(tmp_path: Path) -> None:
    prints = {probe(plant(tmp_path / str(mode), fake_trees.orin_nano(mode)))["fingerprint"] for mode in (None, 0, 1)}
    assert len(prints) == 3
    facts = probe(tmp_path / "1")
    assert fingerprint({**facts, "l4t": "36.5"}) != facts["fingerprint"]


def test_results_of_two_power_modes_do_not_compare_and_say_why(tmp_path: Path) -> None:
    low, high = (probe(plant(tmp_path / str(mode), fake_trees.orin_nano(mode))) for mode in (0, 2))
    assert device_differs(low, high) == (
        "measured on different devices: power_mode name 15W, ID 0 and name MAXN_SUPER, ID 2"
    )


def test_fingerprint_of_a_document_from_before_stays(x86_vm: Path) -> None:
    """A device as studies/bench/cells/peers-t1.json holds it, which knows nothing of power modes and clusters."""
    stored = {
        "board": None, "cpu_model": "AMD EPYC", "architecture": "x86_64",
        "isa": ["avx2", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "f16c", "fma"],
        "cores": {"physical": 2, "logical": 2, "allowed": 2}, "last_level_cache_bytes": 33554432,
        "memory_bytes": 25276502016, "governor": None, "frequencies": None, "os": "Debian GNU/Linux 13 (trixie)",
        "kernel": "6.18.44", "python": "3.11.7", "onnxruntime": "1.32.0",
    }  # fmt: skip
    assert fingerprint(stored) == "2cca1d77ef711e8b"
    assert fingerprint({**stored, "power_mode": None, "l4t": None, "clusters": []}) == "2cca1d77ef711e8b"


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_this_host() -> None:
    facts = probe()
    json.dumps(facts)
    assert facts["architecture"] == platform.machine()
    assert facts["kernel"] == platform.release()
    assert facts["cores"]["logical"] >= facts["cores"]["allowed"] >= 1
    assert facts["memory_bytes"] > 100 << 20
    assert facts["isa"]
    assert probe()["fingerprint"] == facts["fingerprint"]


def test_a_command_that_is_not_there_says_nothing() -> None:
    assert run_here(["saap-no-such-command"]) is None
    assert run_here(["false"]) is None
    assert run_here(["echo", "word"]) == "word\n"
