"""Memory that tensors leave is used again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from knowledge_compression.memory import _glibc

PAGES_ASKED_FOR = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from knowledge_compression.memory import reuse_freed_memory
    reuse_freed_memory()

def work():
    for megabytes in (4, 12, 6, 10, 8) * 4:
        first = torch.ones(megabytes << 18)
        second = first * 2
        both = torch.cat([first, second])
        del first, second
        next = both + 1
        del both
        last = next * 2
        del next, last

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(_glibc() is None, reason="only glibc is told what to keep")
def test_freed_memory_is_not_asked_for_again():
    # Where glibc begins; left alone, it raises its thresholds or does not, as a process's memory happens to lie.
    begins = os.environ | dict.fromkeys(["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"], str(1 << 17))
    asked = {}
    for way in ("kept", "as it is"):
        command = [sys.executable, "-c", PAGES_ASKED_FOR, way]
        asked[way] = int(subprocess.run(command, env=begins, capture_output=True, check=True).stdout)
    assert asked["kept"] < asked["as it is"] / 2
