"""Model types of architectures that the library gguf names, and why they are not written as GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Unwritten:
    """A model type that is not written.

    Attributes:
        architecture: gguf's name for it.
        reason: why, as the end of a sentence.
    """

    architecture: str
    reason: str


_NO_HEAD = "GGUF files have no tensors for the head by which it fills blanks"


def _text_of(kind: str, architecture: str) -> Unwritten:
    return Unwritten(
        architecture, f"its network reads images as well; the part that reads text is written, as the type {kind}"
    )


UNWRITTEN: dict[str, Unwritten] = {
    **{
        kind: Unwritten(architecture, _NO_HEAD)
        for kind, architecture in {
            **dict.fromkeys(("bert", "camembert", "distilbert", "roberta", "xlm-roberta"), "bert"),
            **{"eurobert": "eurobert", "jina_embeddings_v3": "jina-bert-v3", "modernbert": "modern-bert"},
            "nomic_bert": "nomic-bert",
        }.items()
    },
    "bamba": Unwritten("granitehybrid", "its files could not be told from those of Granite 4's hybrids"),
    "bitnet": Unwritten("bitnet", "llama.cpp computes its feed-forward networks with SiLU instead of squared ReLU"),
    "falcon_mamba": Unwritten(
        "mamba", "llama.cpp gives all its norms one epsilon, but those of its mixers have another"
    ),
    "gemma3": _text_of("gemma3_text", "gemma3"),
    "gemma3n": _text_of("gemma3n_text", "gemma3n"),
    "gemma4": _text_of("gemma4_text", "gemma4"),
    "gemma4_unified": _text_of("gemma4_unified_text", "gemma4"),
    "gptj": Unwritten("gptj", "llama.cpp names its architecture, but cannot run it"),
    "llama4": _text_of("llama4_text", "llama4"),
    "mt5": Unwritten("t5", "its files could not be told from T5's, whose decoder scales its states"),
    "phimoe": Unwritten("phimoe", "llama.cpp computes the weights of its experts differently"),
    "qwen3_5": _text_of("qwen3_5_text", "qwen35"),
    "qwen3_5_moe": _text_of("qwen3_5_moe_text", "qwen35moe"),
}


UNWRITTEN |= {
    kind: Unwritten(
        architecture, "its network reads sound as well; a file of llama.cpp holds only the part that reads text"
    )
    for kind, architecture in {
        **dict.fromkeys(("audioflamingo3", "qwen2_audio"), "qwen2"),
        **{"qwen3_asr": "qwen3vl", "voxtral": "llama"},
    }.items()
}


def reason_against(kind: str) -> str:
    """Why a model type that has no description is not written."""
    if (found := UNWRITTEN.get(kind)) is not None:
        return found.reason
    return f"gguf {version('gguf')} has no architecture for it"
