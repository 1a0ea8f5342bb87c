#!/usr/bin/env bash
# torch 2.13.0 with greenlet 3.5.6: torch's autocast belongs to the thread, so a context that one greenlet opens is on in
# the greenlet that it switches to, for as long as the first one waits.
# Seen: autocast is on in the main greenlet while another stands inside `with torch.autocast(...)`, and off afterwards.
# Why it matters here: the calibrated walk suspends forward passes in greenlets before every block. A context opened
# inside a pass would narrow the solver that runs while the pass waits; it has to be opened around each resumption.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 greenlet==3.5.6
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from greenlet import getcurrent, greenlet
main = getcurrent()
def forward_pass():
    with torch.autocast("cpu", torch.bfloat16):
        main.switch()
waiting = greenlet(forward_pass)
assert not torch.is_autocast_enabled("cpu")
waiting.switch()
assert torch.is_autocast_enabled("cpu"), "the context no longer leaks into the greenlet that goes on"
waiting.switch()
assert not torch.is_autocast_enabled("cpu")
print("as found")
PYTHON
