#!/usr/bin/env bash
# safetensors 0.8.0: save_file makes files that only their owner can read (mode 0600), whatever the umask says; Python's own
# open() beside it follows the umask, as do config.json and tokenizer.json of the same model folder.
# Why it matters here: a model that one person saves in a group's folder cannot be loaded by the others; a store gives all
# files of a run the mode of its first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.1
cd "$folder"
umask 022
"$folder/env/bin/python" - <<'PYTHON'
import os
import stat

import numpy as np
from safetensors.numpy import save_file

save_file({"weight": np.ones(3)}, "model.safetensors")
open("config.json", "w").write("{}")
modes = {name: oct(stat.S_IMODE(os.stat(name).st_mode)) for name in ("model.safetensors", "config.json")}
print(modes)
assert modes["config.json"] == "0o644"
assert modes["model.safetensors"] == "0o600", "save_file follows the umask now"
print("as found")
PYTHON
