#!/usr/bin/env bash
# wandb 0.31.0: a NaN that is written to a run's summary is not there afterwards, while an infinity is, and so is a NaN
# that is logged as a step's metric.
# Seen offline: run.summary['perplexity'] = nan leaves no such key in run.summary, without an error or a warning.
# Why it matters here: a run whose perplexity is not a number has no perplexity on a dashboard and looks like one in which
# it was not measured; it has to be marked by a value that is kept.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import math
import os

os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
import wandb

run = wandb.init(project="finding", dir=".")
run.summary["perplexity"] = math.nan
run.summary["largest"] = math.inf
run.log({"loss": math.nan})
summary = dict(run.summary)
run.finish()
print({name: value for name, value in summary.items() if not name.startswith("_")})
assert "perplexity" not in summary, "a NaN stays in the summary now"
assert summary["largest"] == math.inf
assert math.isnan(summary["loss"])
print("as found")
PYTHON
