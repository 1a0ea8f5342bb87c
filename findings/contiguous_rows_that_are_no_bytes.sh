#!/usr/bin/env bash
# PyTorch 2.13.0: a tensor whose is_contiguous() is True, and of which contiguous() therefore gives the tensor itself, may refuse
# view(torch.uint8): "self.stride(-1) must be 1". The stride of an axis of length 1 counts for the view, and not for the question
# whether a tensor is contiguous. A row of a transposed matrix is such a tensor; only a copy in the contiguous format has stride 1.
# Why it matters here: packed codes are read as bytes, and GPTQ stores its words transposed. A layer whose codes of one output fill a
# single word (8 inputs of 4 bits; a router of 8 experts) was refused with this message, while all wider ones were read.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PYTHON'
import torch

for words in (1, 2):
    codes = torch.arange(8 * words, dtype=torch.int32).reshape(words, 8).T
    for name, tensor in (("contiguous()", codes.contiguous()), ("a copy", codes.clone(memory_format=torch.contiguous_format))):
        try:
            seen = list(tensor.view(torch.uint8).shape)
        except RuntimeError as error:
            seen = str(error)
        print(f"{words} words, {name}: contiguous {tensor.is_contiguous()}, strides {tensor.stride()}: {seen}")
PYTHON
"$folder/env/bin/python" "$folder/look.py" | tee "$folder/found.txt"
diff "$folder/found.txt" - <<FOUND
1 words, contiguous(): contiguous True, strides (1, 8): self.stride(-1) must be 1 to view Int as Byte (different element sizes), but got 8
1 words, a copy: contiguous True, strides (1, 1): [8, 4]
2 words, contiguous(): contiguous True, strides (2, 1): [8, 8]
2 words, a copy: contiguous True, strides (2, 1): [8, 8]
FOUND
echo "as found"
