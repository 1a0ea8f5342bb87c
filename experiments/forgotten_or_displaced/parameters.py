"""Trainable parameters of every recovery, counted on LLaMA-7B and OPT-6.7b without weights, beside the paper's figures.

    python experiments/forgotten_or_displaced/parameters.py > experiments/forgotten_or_displaced/parameters.md

Networks are built from their configurations on the meta device; the adapters are peft's own, put in by the code that
every run uses.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from itertools import combinations
from math import floor
from pathlib import Path

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from knowledge_compression.models import Model
from knowledge_compression.models.targets import linear_layers
from knowledge_compression.recovery.lora import ROLES, Lora, add_lora
from knowledge_compression.training import TrainingSettings

FOLDER = Path(__file__).parent
CONFIGS = {
    "Llama-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "OPT-6.7b": OPTConfig(
        hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32
    ),
}
RANKS, LENGTHS = (2, 3, 4), (26, 50, 100)


def network(name: str) -> Model:
    with torch.device("meta"):
        return Model(AutoModelForCausalLM.from_config(CONFIGS[name]), None, name)  # type: ignore[arg-type]


def inner(name: str) -> int:
    config = CONFIGS[name]
    return getattr(config, "intermediate_size", None) or config.ffn_dim


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def lora_count(name: str, rank: int) -> int:
    model = network(name)
    model.network.requires_grad_(False)
    with torch.device("meta"):
        return trainable(add_lora(model, Lora(TrainingSettings(steps=1), rank=rank)))


def prompt_count(name: str, tokens: int) -> int:
    with torch.device("meta"):
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=tokens)
        return trainable(get_peft_model(network(name).network, config))


def prefix_count(name: str, tokens: int) -> int:
    with torch.device("meta"):
        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=tokens)
        return trainable(get_peft_model(network(name).network, config))


def published(name: str, kind: str) -> list[str]:
    with (FOLDER / "published" / "table1.csv").open(newline="") as file:
        return [row["param"] for row in csv.DictReader(file) if (row["model"], row["type"]) == (name, kind)]


def millions(count: float) -> str:
    return f"{count / 1e6:.3f}"


def subsets(name: str) -> Iterator[tuple[str, int]]:
    """Every choice of projections of one block, and the parameters that rank 1 adds to them over all blocks."""
    model = network(name)
    sizes: dict[str, int] = {}
    for layer in linear_layers(model):
        if layer.role in ROLES:
            short = layer.path.rpartition(".")[2]
            sizes[short] = sizes.get(short, 0) + sum(layer.weight.shape)
    for count in range(1, len(sizes) + 1):
        for chosen in combinations(sizes, count):
            yield ", ".join(chosen), sum(sizes[short] for short in chosen)


def cut(value: float) -> str:
    return f"{floor(value / 1e5) / 10:.1f}M"


def rounded(value: float) -> str:
    return f"{value / 1e6:.1f}M"


def table(header: str, rows: list[list[str]]) -> str:
    columns = header.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines) + "\n"


def main() -> None:
    write = sys.stdout.write
    write("# Trainable parameters\n\nMade by `python experiments/forgotten_or_displaced/parameters.py`, in millions.\n")
    for name, config in CONFIGS.items():
        width, layers = config.hidden_size, config.num_hidden_layers
        rows = []
        for rank, param in zip(RANKS, published(name, "lora"), strict=True):
            formula = layers * (8 * width * rank + 4 * inner(name) * rank)
            rows.append([f"LoRA rank {rank}", millions(lora_count(name, rank)), millions(formula), param])
        for tokens, param in zip(LENGTHS, published(name, "prompt"), strict=True):
            rows.append([f"prompt of {tokens}", millions(prompt_count(name, tokens)), millions(tokens * width), param])
        for tokens, param in zip(LENGTHS, published(name, "ptune"), strict=True):
            counts = millions(prefix_count(name, tokens)), millions(layers * tokens * width)
            rows.append([f"prefix of {tokens}", *counts, param])
        (param,) = published(name, "IDP")
        rows.append(
            ["IDP 50 + 100", millions(sum(prompt_count(name, t) for t in (50, 100))), millions(150 * width), param]
        )
        write(f"\n## {name}\n\n")
        write(table("recovery | counted here, all projections | formula of Appendix A | Param column", rows))

        write("\nWhich projections give the Param column of LoRA at all three ranks:\n\n")
        for how, show in (("rounded", rounded), ("cut off", cut)):
            fitting = [
                modules
                for modules, per_rank in subsets(name)
                if [show(rank * per_rank) for rank in RANKS] == published(name, "lora")
            ]
            write(f"- {how} to one decimal: {'; '.join(fitting) or 'no choice of projections'}\n")
    write(
        "\nThe formula counts `8 d r` for the four attention projections, which is right, and `4 d_inter r` for the\n"
        "feed-forward ones, where LLaMA has three with `(d + d_inter) r` each and OPT two. For prefixes it counts one\n"
        "vector a token and layer; keys and values are two, which is what peft trains. The Param column's 3.1M for\n"
        "a prefix of 26 tokens is the formula's figure for 24 tokens. Prompts and IDP agree in all three.\n"
    )


if __name__ == "__main__":
    main()
