#!/usr/bin/env bash
# GPTQModel 7.7.0 on a CPU: GPTQModel.load(..., dtype="float32") loads the model in bfloat16 without a word, although its signature
# takes a string or a torch.dtype, and although the file is float32. Only dtype=torch.float32 is heard. A text that is no type at
# all ("float23") is taken as well.
# Why it matters here: experiments/knowledge_per_bit gives every program the same weights in float32; rounded to 8 bits of mantissa
# before they are quantized, they are others, and so are the second moments.
# (It is installed beside torch 2.13.0, whose build is at hand; it asks for 2.14.1.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip=("$folder/env/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" setuptools==84.2.1 wheel==0.48.0 torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 \
  threadpoolctl==3.8.0 device-smi==0.5.7 protobuf==7.36.2 pillow==13.0.0 requests==2.34.2 pypcre==0.6.4 tokenicer==0.0.14 \
  logbar==0.4.15 jinja2==3.1.6 ninja==1.13.2 maturin==1.16.0 pyarrow==26.0.1 dill==0.4.1 torchao==0.18.0 defuser==0.0.28
"${pip[@]}" --no-deps --no-build-isolation gptqmodel==7.7.0
cd "$folder"
export GPTQMODEL_CPU_WORKERS=2
cat > look.py <<'PYTHON'
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("model")
words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, "w0"))
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained("model")
with open("found.txt", "w") as file:
    for dtype in (torch.float32, "float32", "float23"):
        model = GPTQModel.load("model", QuantizeConfig(bits=4, group_size=32), device="cpu", dtype=dtype)
        file.write(f"{dtype!r}: {model.model.model.embed_tokens.weight.dtype}\n")
PYTHON
"$folder/env/bin/python" -W ignore look.py > log.txt 2>&1 || { tail -5 log.txt; exit 1; }
cat found.txt
diff found.txt - <<FOUND
torch.float32: torch.float32
'float32': torch.bfloat16
'float23': torch.bfloat16
FOUND
echo "as found"
