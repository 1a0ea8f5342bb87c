#!/usr/bin/env bash
# transformers 5.24.0: save_pretrained writes an infinite setting into config.json as {"__float__": "Infinity"}, which is
# valid JSON. from_pretrained reads it back as infinity. from_dict, given what json.load returns for that file, does not:
# Bamba's and Mamba 2's configurations are refused with a StrictDataclassFieldValidationError, because the setting
# (time_step_limit) is no number.
# Why it matters here: settings are read before a network is loaded and are tried out before a model is saved; both have
# to go through a file, and other programs that read config.json as plain JSON meet a dictionary in place of a number.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 numpy==2.4.6
cd "$folder"
cat > look.py <<'PYTHON'
import json
from pathlib import Path

from transformers import BambaConfig, Mamba2Config

found = []
for kind in (BambaConfig, Mamba2Config):
    kind().save_pretrained("saved")
    written = json.loads(Path("saved/config.json").read_text())
    found.append(f"{kind.model_type}: written as {written['time_step_limit']}")
    found.append(f"{kind.model_type}: from the file {list(kind.from_pretrained('saved').time_step_limit)}")
    try:
        found.append(f"{kind.model_type}: from its content {list(kind.from_dict(written).time_step_limit)}")
    except Exception as error:
        found.append(f"{kind.model_type}: from its content {type(error).__name__}")
Path("found.txt").write_text("\n".join(found) + "\n")
PYTHON
"$folder/env/bin/python" -W ignore look.py > log.txt 2>&1 || { tail -5 log.txt; exit 1; }
cat found.txt
diff found.txt - <<FOUND
bamba: written as [0.0, {'__float__': 'Infinity'}]
bamba: from the file [0.0, inf]
bamba: from its content StrictDataclassFieldValidationError
mamba2: written as [0.0, {'__float__': 'Infinity'}]
mamba2: from the file [0.0, inf]
mamba2: from its content StrictDataclassFieldValidationError
FOUND
echo "as found"
