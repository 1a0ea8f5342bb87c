"""The model types of the installed transformers whose parts are known, at their default sizes, on the meta device.

    python -m knowledge_compression.models.coverage docs/models.md

writes the table as Markdown; ``--only llama,t5`` examines only those types. It takes one to three minutes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from knowledge_compression.errors import BadInput
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER
from knowledge_compression.models.model import Model
from knowledge_compression.models.roles import CROSS_ATT, DECODER_SELF_ATT, ENCODER_ATT, FINAL, ROLES
from knowledge_compression.models.targets import placed

_TABLES = {DECODER: "Causal", ENCODER: "Masked", ENCODER_DECODER: "Sequence to sequence"}
_COLUMNS = {"attention": (ENCODER_ATT, DECODER_SELF_ATT, CROSS_ATT)} | {
    role.replace("_", " "): (role,) for role in ROLES if role not in (ENCODER_ATT, DECODER_SELF_ATT, CROSS_ATT, FINAL)
}


# What the tests do in addition to this table; one of them compares the number with the list.
_TRIED = (
    "92 types were tried from end to end, each with a tiny network of random weights and a tokenizer of its kind:",
    "",
    "1. The network is loaded.",
    "2. It is pruned by magnitude (`target=att`, `ff`, `all` and `final`), quantized to int8, and quantized by GPTQ.",
    "3. It is saved, and read back to equal logits.",
    "4. It is scored, and the scores are compared to 1e-4: decoders and encoder-decoders with stock lm-eval, encoders "
    "with a plain pass over each text.",
    "",
    "The command is `KC_TEST_EXHAUSTIVE=1 python -m pytest tests/models/test_every_type.py`; without the variable, a "
    "sample with a type of every kind. The list is `tests/helpers/every_type.py`. All types pass, with these notes:",
    "",
    "- `mamba` and `mamba2` have no attention and no feed-forward layers. `target=att` and `ff` say so; `mixer` and "
    "`all` select what they have.",
    "- `led` has projections for global attention, which no text here uses. GPTQ rounds them to the nearest value, and "
    "the report names them (`no_tokens`).",
    "- `mamba` and `jamba` multiply by the weight of `dt_proj` without calling the layer, so GPTQ never sees its "
    "inputs and rounds it to the nearest value too.",
    "- `zamba` and `zamba2` share attention and feed-forward layers between blocks. A shared matrix is one layer, in "
    "the first of its blocks: it is counted and compressed once, on the inputs that it has there, and holds in all of "
    "them. Adapters of `zamba2` for its later blocks read nothing in the first, so GPTQ rounds them to the nearest "
    "value. Such networks are not streamed.",
    "- `deepseek_v4` multiplies groups of attention's outputs by parts of one weight (`o_a_proj`). Methods that change "
    "weights compress it on the inputs of all groups together; the int8 methods and packed formats refuse it, and LoRA "
    "leaves it out.",
    "- `mbart` is compared with a plain pass, not with stock lm-eval. transformers moves the last of mBART's labels, "
    "normally the token of the language, to the front of what the decoder reads. lm-eval's labels are the answer, so "
    "its decoder reads the end of the answer before it predicts it.",
)


@dataclass(frozen=True)
class Coverage:
    """The result for one model type of one table.

    Attributes:
        table: ``decoder``, ``encoder`` or ``encoder_decoder``: the table of transformers.
        type: the model type.
        weights: number of weights in the blocks' matrices, by role.
        left_out: number of entries in other parameters of the blocks, by kind.
        outside: parts that do not belong to the language model.
        trouble: why it does not build or cannot be placed; empty if it is placed.
        builds: whether transformers builds it from its default configuration.
    """

    table: str
    type: str
    weights: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    outside: Sequence[str] = ()
    trouble: str = ""
    builds: bool = True

    @property
    def in_blocks(self) -> int:
        """Number of entries in the blocks' parameters of two or more dimensions."""
        return sum(self.weights.values()) + sum(self.left_out.values())


def cover(only: Iterable[str] = ()) -> Iterator[Coverage]:
    """Examine every type of the three tables, or some of them.

    Raises:
        BadInput: a type is in none of the tables.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
    from transformers.models.auto import modeling_auto as auto

    tables = {
        DECODER: (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
        ENCODER: (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, AutoModelForMaskedLM),
        ENCODER_DECODER: (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
    }
    chosen = set(only)
    if unknown := chosen - {name for names, _ in tables.values() for name in names}:
        raise BadInput(f"transformers has no language model of the type {', '.join(sorted(unknown))}")
    for table, (names, kind) in tables.items():
        for name in sorted(chosen.intersection(names) if chosen else names):
            yield _one(table, name, kind)


def _one(table: str, name: str, kind: type) -> Coverage:
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(name)
        with torch.device("meta"):
            network = kind.from_config(config)  # type: ignore[attr-defined]
    except Exception as error:  # any error of another library about its own defaults is the reason to report
        return Coverage(table, name, trouble=f"{type(error).__name__}: {error}".split("\n")[0], builds=False)
    model = Model(network, None, name)  # type: ignore[arg-type]  # a skeleton reads no text
    try:
        everything = placed(model)
    except BadInput as error:
        return Coverage(table, name, trouble=str(error))
    weights, left_out = Counter[str](), Counter[str]()
    for layer in (layer for layer in everything.layers if layer.path not in everything.around):
        weights[layer.role] += layer.parameters
    for _, _, count, reason in everything.others:
        left_out[reason] += count
    return Coverage(table, name, weights, left_out, model.architecture.exceptions.outside)


def as_markdown(found: Sequence[Coverage]) -> str:
    """The page: how many types are placed, a table for each family, and the types not placed, with reasons."""
    import transformers

    built = [one for one in found if one.builds]
    done = [one for one in built if not one.trouble]
    lines = [
        "# Language models that are placed",
        "",
        "A model type is *placed* if every parameter of its blocks with two or more dimensions has a role or is left "
        "out by name. The tables of causal, masked and sequence-to-sequence models in transformers "
        f"{transformers.__version__} have {len(found)} entries. Of these, {len(built)} build from their default "
        f"configuration, and {len(done)} of those are placed. That a type is placed means that its parts are known, "
        "not that every compression and suite was tried on it.",
        "",
        "The figures are millions of weights in the blocks, by role; `target=ff` includes experts and shared experts. "
        "The last column says what is left out and why, as a share of the blocks. "
        "`python -m knowledge_compression.models.coverage docs/models.md` made this page, on the meta device.",
        "",
        *_TRIED,
    ]
    for table, title in _TABLES.items():
        rows = [one for one in done if one.table == table]
        if rows:
            heads = ["type", *_COLUMNS, "left out"]
            lines += ["", f"## {title}", "", f"| {' | '.join(heads)} |", "|---|" + "--:|" * len(_COLUMNS) + "---|"]
            lines += [_row(one) for one in rows]
    troubled = [one for one in found if one.trouble]
    if troubled:
        lines += ["", "## Not placed", "", "| type | table | builds | why |", "|---|---|---|---|"]
        lines += [
            f"| {one.type} | {_TABLES[one.table].lower()} | {'yes' if one.builds else 'no'} | "
            f"{one.trouble.replace('|', '/')} |"
            for one in troubled
        ]
    return "\n".join(lines) + "\n"


def _row(one: Coverage) -> str:
    figures = [sum(one.weights[role] for role in roles) / 1e6 for roles in _COLUMNS.values()]
    left = [f"{reason} {count / one.in_blocks:.2%}" for reason, count in sorted(one.left_out.items())]
    left += [f"`{part}` is not the language model" for part in one.outside]
    return f"| {one.type} | {' | '.join(f'{n:,.1f}' if n else '' for n in figures)} | {', '.join(left)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m knowledge_compression.models.coverage", description=__doc__)
    parser.add_argument("page", type=Path, help="where the Markdown goes")
    parser.add_argument("--only", default="", help="model types, separated by commas; all if not given")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        found = list(cover(filter(None, chosen.only.split(","))))
        chosen.page.write_text(as_markdown(found))
    except (BadInput, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{sum(not one.trouble for one in found)} of {len(found)} placed: {chosen.page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
