#!/usr/bin/env bash
# auto-round 0.16.1 with transformers 5.24.0 on a CPU: asymmetric 4 bits that quantize() has tuned cannot be saved in the format that
# auto-round takes by itself. save_quantized(folder, format="auto_round") ends with a TypeError (WQLinear_GEMM.__init__() got an
# unexpected keyword argument 'weight_dtype'), after all the time of tuning. quantize_and_save saves the same model in the same format;
# so do the two calls at symmetric 4 bits and at asymmetric 3.
# Why it matters here: experiments/knowledge_per_bit has auto-round save what it tuned; five minutes of tuning were lost.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.24.0 \
  auto-round==0.16.1
cd "$folder"
cat > look.py <<'PYTHON'
from pathlib import Path

import torch
from auto_round import AutoRound
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, "w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
text = [" ".join(f"w{(7 * place + shift) % 64}" for place in range(64)) for shift in range(8)]
how = {"iters": 1, "dataset": text, "nsamples": 8, "seqlen": 32, "group_size": 32, "device_map": "cpu"}


def rounding(bits, symmetric):
    torch.manual_seed(0)
    return AutoRound(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)), tokenizer, bits=bits, sym=symmetric, **how)


def in_two_calls(bits, symmetric):
    tuned, place = rounding(bits, symmetric), f"two{bits}{symmetric}"
    tuned.quantize()
    try:
        tuned.save_quantized(place, format="auto_round")
    except TypeError as error:
        return str(error).rpartition(".")[2]
    return "saved" if list(Path(place).rglob("model.safetensors")) else "nothing"


found = [f"{bits} bits, symmetric {symmetric}: {in_two_calls(bits, symmetric)}" for bits, symmetric in ((4, True), (3, False), (4, False))]
rounding(4, False).quantize_and_save("one", format="auto_round")
found.append("4 bits, symmetric False, in one call: " + ("saved" if list(Path("one").rglob("model.safetensors")) else "nothing"))
Path("found.txt").write_text("\n".join(found) + "\n")
PYTHON
"$folder/env/bin/python" -W ignore look.py > log.txt 2>&1 || { tail -5 log.txt; exit 1; }
cat found.txt
diff found.txt - <<FOUND
4 bits, symmetric True: saved
3 bits, symmetric False: saved
4 bits, symmetric False: __init__() got an unexpected keyword argument 'weight_dtype'
4 bits, symmetric False, in one call: saved
FOUND
echo "as found"
