#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: the load-balancing loss of Mixtral (and of the mixtures that share the function)
# adds up the tokens of all blocks before it compares experts, so a block may neglect the experts that another prefers.
# Seen: of two routers, one sends all tokens to experts 0 and 1, the other all to 2 and 3. Each alone has twice the loss of
# an even router; both together have the smallest possible loss.
# Expected: equations 4 to 6 of Switch Transformers (Fedus et al., 2022) for each router by itself, then their mean.
# Why it matters here: half of a block's experts would hold nothing, which the study of facts in experts would take for a
# property of the facts. world_moe is trained with the function on one block at a time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as balance


def router(experts):
    logits = torch.full((64, 4), -9.0)
    logits[torch.arange(64), torch.tensor(experts)[torch.arange(64) % len(experts)]] = 9.0
    return logits


low, high, even = router([0, 1]), router([2, 3]), router([0, 1, 2, 3])
alone = [float(balance((one,), 4, 1)) for one in (low, high, even)]
pooled = float(balance((low, high), 4, 1))
print(f"alone {alone[0]:.3f} and {alone[1]:.3f}, even {alone[2]:.3f}; both together {pooled:.3f}")
assert alone[0] > 1.99 and alone[1] > 1.99 and abs(alone[2] - 1) < 1e-4
assert abs(pooled - 1) < 1e-4
print("as found")
PYTHON
