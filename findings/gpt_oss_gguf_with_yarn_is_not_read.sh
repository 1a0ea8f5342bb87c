#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: a GGUF file of gpt-oss that states how its rotary embeddings are scaled, as every file that
# llama.cpp converts does, ends in a TypeError: for the values of gpt-oss.rope.scaling.* transformers takes the field's first part, which is
# the length of its key. gpt-oss is the one architecture for which these settings are looked at.
# Why it matters here: these settings are read by this program itself, and left out of what transformers is asked to read.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 gguf==0.19.0 \
  accelerate==1.15.0
cd "$folder"
"$folder/env/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import numpy as np
from gguf import GGUFReader, GGUFWriter
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def write(path, scaled):
    writer = GGUFWriter(path, "gpt-oss")
    for key, value in {"context_length": 64, "embedding_length": 64, "block_count": 1, "vocab_size": 8}.items():
        writer.add_uint32(f"gpt-oss.{key}", value)
    if scaled:
        writer.add_string("gpt-oss.rope.scaling.type", "yarn")
        writer.add_float32("gpt-oss.rope.scaling.factor", 32.0)
        writer.add_uint32("gpt-oss.rope.scaling.original_context_length", 4096)
    writer.add_tensor("token_embd.weight", np.ones((8, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


write("plain.gguf", scaled=False)
write("scaled.gguf", scaled=True)
field = GGUFReader("scaled.gguf").fields["gpt-oss.rope.scaling.factor"]
print("value of the field:", field.contents(), "; its first part:", field.parts[0], "; its key has", len(field.name), "letters")
print("without the settings:", load_gguf_checkpoint("plain.gguf")["config"]["model_type"])
try:
    load_gguf_checkpoint("scaled.gguf")
    found = "read"
except TypeError as error:
    found = f"TypeError: {error}"
print("with them:", found)
assert found.startswith("TypeError") and int(field.parts[0][0]) == len(field.name)
print("as found")
PYTHON
