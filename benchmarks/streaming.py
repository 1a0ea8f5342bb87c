"""Streaming magnitude pruning of a randomly filled checkpoint: seconds, peak memory, and rates (also the disk's).

    python benchmarks/streaming.py                    # the shape of LLaMA-7B: 13.5 GB of bfloat16, written and removed
    python benchmarks/streaming.py --layers 2         # the same with fewer blocks, for a quick look

The checkpoint and its compressed copy are in a temporary folder (in ``--folder``) that is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

WIDTH, HIDDEN, HEADS, VOCABULARY = 4096, 11008, 32, 32000
SHARD = 1 << 29  # bytes
ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[3])
import torch
from pathlib import Path
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.walk.streaming import compress_streamed
from knowledge_compression.models import Target
from knowledge_compression.models.loading import LocalModel
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = time.perf_counter()
model = LocalModel("llama", sys.argv[1], stream=True).streamed("cpu")
targets = Target("all", ["decoder_self_att", "ff"]).select(model)
report = compress_streamed(Magnitude(sparsity=0.5), model, targets, None, Path(sys.argv[2]))
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "rss_before": loaded,
    "sparsity": report.sparsity,
    "weights": report.parameters_touched,
    "threads": torch.get_num_threads(),
}))
"""


def tensors(layers: int):
    """Names and shapes of a LLaMA checkpoint, in forward order."""
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (WIDTH, WIDTH)
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.{name}.weight", (HIDDEN, WIDTH)
        yield f"{prefix}.mlp.down_proj.weight", (WIDTH, HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def write_checkpoint(folder: Path, layers: int) -> tuple[int, float]:
    """Fill a sharded checkpoint at random; gives its bytes and the seconds that writing took."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_attention_heads=HEADS,
        num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        folder
    )
    generator, weight_map = torch.Generator().manual_seed(0), {}
    shard, held, size, number, writing = {}, 0, 0, 0, 0.0

    def flush() -> None:
        nonlocal shard, held, number, writing
        if shard:
            name = f"model-{number:05d}.safetensors"
            start = time.perf_counter()
            save_file(shard, folder / name, {"format": "pt"})
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
            writing += time.perf_counter() - start
            weight_map.update(dict.fromkeys(shard, name))
            shard, held, number = {}, 0, number + 1

    for name, shape in tensors(layers):
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if held + tensor.nbytes > SHARD:
            flush()
        shard[name] = tensor
        held, size = held + tensor.nbytes, size + tensor.nbytes
    flush()
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size, writing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="blocks; LLaMA-7B has 32")
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder is made")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/streaming.json"))
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="kc-streaming-", dir=arguments.folder))
    try:
        (scratch / "dense").mkdir()
        size, writing = write_checkpoint(scratch / "dense", arguments.layers)
        print(f"checkpoint: {size / 1e9:.2f} GB, written at {size / writing / 1e9:.2f} GB/s")
        command = [sys.executable, "-c", CHILD, str(scratch / "dense"), str(scratch / "pruned"), str(ROOT)]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    result |= {"checkpoint_bytes": size, "layers": arguments.layers, "plain_write_bytes_per_second": size / writing}
    result["peak_over_checkpoint"] = result["peak_rss"] / size
    result["seconds_over_plain_write"] = result["seconds"] / writing
    print(
        f"magnitude 50 %: {result['seconds']:.0f} s ({result['seconds_over_plain_write']:.1f} times plain writing), "
        f"peak resident {result['peak_rss'] / 1e9:.2f} GB ({result['peak_over_checkpoint']:.2f} of the checkpoint; "
        f"{result['rss_before'] / 1e9:.2f} GB before the model), sparsity {result['sparsity']:.6f}"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
