#!/usr/bin/env bash
# GPTQModel 7.7.0: on a machine of one or two processors GPTQModel.load ends with "Virtual pool 'model_loader:cpu' requests 2
# workers but parent 'cpu' only has 1", whatever the model: a pool has half as many workers as there are processors, and two of
# them are to load models. With three processors it loads. GPTQMODEL_CPU_WORKERS=2 in the environment helps.
# Why it matters here: experiments/knowledge_per_bit and experiments/format_peers have GPTQModel quantize and read, often on such machines.
# (It is installed beside torch 2.13.0, whose build is at hand; it asks for 2.14.1. The number of processors is told to it from outside.)
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
cat > look.py <<'PYTHON'
import os
import sys

os.cpu_count = lambda: int(sys.argv[1])
from gptqmodel import GPTQModel, QuantizeConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("model")
words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, "w0"))
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained("model")
try:
    GPTQModel.load("model", QuantizeConfig(bits=4, group_size=32), device="cpu")
    found = "loaded"
except ValueError as error:
    found = str(error)
with open("found.txt", "a") as file:
    file.write(f"{sys.argv[1]} processors: {found}\n")
PYTHON
unset GPTQMODEL_CPU_WORKERS
for processors in 1 2 3; do "$folder/env/bin/python" -W ignore look.py $processors > log.txt 2>&1 || { tail -5 log.txt; exit 1; }; done
cat found.txt
refused="Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1"
diff found.txt - <<FOUND
1 processors: $refused
2 processors: $refused
3 processors: loaded
FOUND
echo "as found"
