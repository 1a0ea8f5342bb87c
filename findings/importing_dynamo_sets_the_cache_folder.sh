#!/usr/bin/env bash
# torch 2.13.0: importing torch._dynamo, which many libraries do, writes torch's own default into TORCHINDUCTOR_CACHE_DIR,
# the variable by which a user chooses the folder of compiled code.
# Seen: the variable is unset after `import torch`, and names a folder of the system's temporary ones after
# `import torch._dynamo`, before anything is compiled. Programs started from this one inherit it, and setdefault() is late.
# Expected: a variable of the user's stays unset until the user sets it.
# Why it matters here: compiled blocks were to be kept in our cache folder unless the user chose another one. The default
# looked like the user's choice, so the code went to a folder that is emptied when the machine starts anew.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
env -u TORCHINDUCTOR_CACHE_DIR "$folder/env/bin/python" - <<'PYTHON'
import os
import subprocess
import sys

import torch

NAME = "TORCHINDUCTOR_CACHE_DIR"
before = os.environ.get(NAME)
import torch._dynamo

after = os.environ.setdefault(NAME, "chosen")
asked = [sys.executable, "-c", f"import os; print(os.environ.get({NAME!r}))"]
inherited = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
print("before", before, "after", after, "inherited", inherited)
assert before is None
assert after != "chosen" and "torchinductor_" in after
assert inherited == after
print("as found")
PYTHON
