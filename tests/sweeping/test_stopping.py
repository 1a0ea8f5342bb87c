"""A process that is told to end ends, whatever that interrupts, and with the status that says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

START = """
import gc, os, signal, sys, time, weakref
from knowledge_compression.stopping import end_when_closed, end_with_parent, stoppable

def ready():
    print("ready", flush=True)

def busy(seconds=0.0, for_ever=True):
    end = time.monotonic() + seconds
    while for_ever or time.monotonic() < end:
        pass
"""
WHATEVER = {
    "plain work": """
with stoppable():
    ready()
    busy()
""",
    "sleep": """
with stoppable():
    ready()
    time.sleep(600)
""",
    "a finalizer, which drops what is raised in it": """
class Told:
    pass

with stoppable():
    told = Told()
    weakref.finalize(told, lambda: None)
    callback = weakref.ref(told, lambda _: (ready(), busy(1.5, for_ever=False)))
    del told
    busy()
""",
    "a callback of C code, which drops what is raised in it": """
import ctypes

with stoppable():
    call = ctypes.CFUNCTYPE(None)(lambda: (ready(), busy(1.5, for_ever=False)))
    call()
    busy()
""",
    "code that swallows everything": """
with stoppable(grace=1.0):
    ready()
    while True:
        try:
            busy()
        except BaseException:
            pass
""",
}


def started(program: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", START + program], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("interrupted", WHATEVER)
def test_ctrl_c_once_ends_it_with_130(interrupted: str) -> None:
    process = started(WHATEVER[interrupted])
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.startswith("stopping; finished work is kept") and "Traceback" not in said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_end_it_too(number: int, status: int) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("whoever started the tests ignores this signal, as nohup does, and so it stays ignored")
    process = started(WHATEVER["sleep"])
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status


def test_what_is_open_is_closed_first(tmp_path: Path) -> None:
    file = tmp_path / "closed"
    process = started(f"""
with stoppable():
    try:
        ready()
        busy()
    finally:
        open({str(file)!r}, "w").close()
""")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and file.exists()


def test_ctrl_c_twice_ends_it_at_once() -> None:
    process = started("""
with stoppable():
    try:
        ready()
        busy()
    finally:
        ready()
        busy()
""")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_the_signals_are_as_before_afterwards() -> None:
    process = started("""
before = signal.getsignal(signal.SIGINT), sys.unraisablehook
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
with stoppable():
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is not before[0]
assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
ready()
""")
    process.communicate(timeout=30)
    assert process.returncode == 0


PARENT = """
child = '''
import os, sys, time
from knowledge_compression.stopping import end_when_closed, end_with_parent
{how}
print(os.getpid(), flush=True)
time.sleep(600)
'''
import subprocess
process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
pid = process.stdout.readline()
ready()
print(pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            "end_with_parent()", marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel does it")
        ),
        "end_when_closed(0)",
    ],
)
def test_a_child_ends_with_a_parent_that_is_killed(how: str) -> None:
    parent = started(PARENT.format(how=how))
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.communicate(timeout=30)
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").is_file() and Path(f"/proc/{child}/stat").read_text().split(") ")[1][0] == "Z":
            return  # dead, and not yet taken note of by whoever adopted it
        time.sleep(0.05)
    pytest.fail("the child goes on")
