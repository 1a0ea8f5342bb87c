"""Memory that tensors leave is used again."""

from __future__ import annotations

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
    asked = {
        way: int(subprocess.run([sys.executable, "-c", PAGES_ASKED_FOR, way], capture_output=True, check=True).stdout)
        for way in ("kept", "as it is")
    }
    assert asked["kept"] < asked["as it is"] / 2
