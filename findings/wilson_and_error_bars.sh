#!/usr/bin/env bash
# statsmodels 0.15.0 with matplotlib 3.11.2: the end of Wilson's interval for 0 of n or n of n misses 0 or 1 by rounding in
# many counts n, on the side that makes an error bar negative, and matplotlib refuses negative error bars.
# Seen: among n = 1 to 399 the interval of n of n ends below 1, or that of 0 of n begins above 0, in a fifth of the counts.
# Why it matters here: a run with one task at 0 or 100 % lost its figure to "'xerr' must not contain negative values".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check statsmodels==0.15.0 matplotlib==3.11.2 numpy==2.4.6 scipy==1.17.1 pandas==3.1.1
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot
from statsmodels.stats.proportion import proportion_confint
missed = []
for n in range(1, 400):
    low, high = proportion_confint(n, n, method="wilson")[1], proportion_confint(0, n, method="wilson")[0]
    missed += [n] * (low < 1) + [-n] * (high > 0)
print(f"{len(missed)} of 798 ends miss; first {missed[:5]}")
assert 100 < len(missed) < 300
n = next(n for n in missed if n > 0)
low, high = proportion_confint(n, n, method="wilson")
try:
    pyplot.errorbar([1.0], [0], xerr=[[1.0 - low], [high - 1.0]])
except ValueError as error:
    print(error)
else:
    raise SystemExit("matplotlib draws it now")
print("as found")
PYTHON
