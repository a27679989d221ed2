"""What is freed stays with the process inside the block, goes back after it, and a user's own settings stay."""

import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")

MAPPED = 60  # faults, fewer than five tensors' even in huge pages of 2 MB
# Page faults of five tensors of 40 MB, one after the other, and megabytes that are resident then.
SCRIPT = """
import contextlib, json, resource, sys
import numpy
from saap.base.allocator import kept_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6

start = resident()
with kept_memory() if sys.argv[1] == "kept" else contextlib.nullcontext():
    numpy.ones(5_000_000)
    before = faults()
    for _ in range(5):
        numpy.ones(5_000_000)
    found = faults() - before
    inside = resident() - start
print(json.dumps({"faults": found, "inside": inside, "after": resident() - start}))
"""


def measured(how, **variables):
    clean = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES" and key[:7] != "MALLOC_"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], env={**clean, **variables}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_freed_memory_is_used_again_and_returned_at_the_end():
    usual, kept = measured("usual"), measured("kept")
    assert kept["faults"] < MAPPED < usual["faults"]
    assert kept["inside"] > 30 > kept["after"]


def test_what_the_user_has_set_stays():
    own = measured("kept", MALLOC_MMAP_THRESHOLD_="1000000")
    assert own["faults"] > MAPPED and own["inside"] < 30
