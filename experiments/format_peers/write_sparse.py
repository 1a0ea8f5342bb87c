"""A tiny random model in the sparse layouts of compressed-tensors, by the library's last version that writes them.

    python experiments/format_peers/write_sparse.py DIR

in an environment of `requirements-sparse.txt`. Each folder of DIR holds a model; beside it, `NAME-dense.safetensors`
has the weights from which the library made it. `tests/models/files/` holds what it wrote, which
`tests/models/test_sparse.py` reads.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = {
    "sparse-24-bitmask": Sparse24BitMaskConfig(format="sparse-24-bitmask", targets=["Linear"], ignore=["lm_head"]),
    "sparse-bitmask": BitmaskConfig(format="sparse-bitmask", targets=["Linear"], ignore=["lm_head"]),
}


def main(folder: Path) -> None:
    """Write both."""
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(vocab_size=16, **SIZES)).half()
        for path, module in network.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                weight = module.weight.data
                order = torch.rand(weight.shape).view(-1, 4).argsort(1).argsort(1)  # two of four, drawn
                keep = (order < 2) if "24" in name else torch.rand(len(order), 4) < 0.4
                weight.mul_(keep.view(weight.shape))
        dense = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        compressor = ModelCompressor(sparsity_config=kind)
        state = compressor.compress(network, dict(network.state_dict()))
        place = folder / name
        network.save_pretrained(place)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, place / "model.safetensors")
        compressor.update_config(str(place))
        save_file(dense, folder / f"{name}-dense.safetensors")
        print(f"{name}: compressed-tensors {version('compressed-tensors')}, {len(state)} tensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
