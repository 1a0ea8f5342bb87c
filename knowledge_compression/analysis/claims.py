"""The claims of the two papers as data: what is compared with what, at which settings, and which way it should go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER

FIRST = "The Cost of Compression (Namburi et al., 2023)"
SECOND = "Do Compressed LLMs Forget Knowledge? (Hoang et al., 2024)"
ALL_FAMILIES = (ENCODER, ENCODER_DECODER, DECODER)
PRUNING = "magnitude"
LOW, MEDIUM, HIGH = (0.1, 0.3), (0.3, 0.5), (0.5, 0.9)  # the first paper's levels, section 3


@dataclass(frozen=True)
class Claim:
    """ "Of two ways to treat a model, this one keeps more of it."

    Attributes:
        name: short and stable.
        text: the claim in our words.
        source: paper and section.
        better, worse: settings (``compression``, ``target``, ``recovery``) of the run that should keep more, and of the
            one that should keep less.
        families: where it is claimed.
        sparsity: closed range of sparsities at which pairs are formed; None takes every pair that is there.
        suites: the suites it is claimed for; empty takes all that have right answers.
        tasks: tasks it is claimed for; empty takes all.
        margin: how much less (in accuracy) the better one may keep and still be as good; 0 claims a real difference.
    """

    name: str
    text: str
    source: str
    better: Mapping[str, str]
    worse: Mapping[str, str]
    families: tuple[str, ...] = ALL_FAMILIES
    sparsity: tuple[float, float] | None = None
    suites: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    margin: float = 0.0


def _pruned(target: str) -> dict[str, str]:
    return {"compression": PRUNING, "target": target}


def _quantized(target: str) -> dict[str, str]:
    return {"compression": "int8_dynamic", "target": target}


def _both(target: str) -> dict[str, str]:
    return {"compression": "prune_int8", "target": target}


def _recovered(compression: str, recovery: str) -> dict[str, str]:
    return {"compression": compression, "recovery": recovery}


WORLD = ("arc_easy", "arc_challenge", "sciq", "webqs", "triviaqa")
LANGUAGE = ("hellaswag", "lambada_openai", "winogrande")

CLAIMS: tuple[Claim, ...] = (
    Claim("pruning_all_hurts_more_than_att", "At equal sparsity, pruning everything hurts more than attention alone",
          f"{FIRST}, 3.1 and 8.1", better=_pruned("att"), worse=_pruned("all")),
    Claim("pruning_all_hurts_more_than_ff", "At equal sparsity, pruning everything hurts more than feed-forward alone",
          f"{FIRST}, 3.1 and 8.1", better=_pruned("ff"), worse=_pruned("all")),
    Claim("encoders_medium_ff_hurts_more", "In encoders at 30-50 %, pruning feed-forward hurts more than attention",
          f"{FIRST}, 8.1", better=_pruned("att"), worse=_pruned("ff"), families=(ENCODER,), sparsity=MEDIUM),
    Claim("others_medium_att_hurts_more",
          "In encoder-decoders and decoders at 30-50 %, pruning attention hurts more than feed-forward",
          f"{FIRST}, 8.1", better=_pruned("ff"), worse=_pruned("att"),
          families=(ENCODER_DECODER, DECODER), sparsity=MEDIUM),
    Claim("low_pruning_is_harmless", "At 10-30 %, pruning hardly hurts: within 2 points of the dense accuracy",
          f"{FIRST}, 3.1", better={"compression": PRUNING}, worse={"compression": "none"}, sparsity=LOW, margin=0.02),
    Claim("decline_steepens_past_half", "Past 50 % sparsity knowledge declines rapidly: 60-90 % keep less than 10-50 %",
          f"{FIRST}, abstract and 3.1", better={"compression": PRUNING, "level": "up to 0.5"},
          worse={"compression": PRUNING, "level": "past 0.5"}),
    Claim("quantizing_att_hurts_less", "Quantizing attention to int8 hurts less than quantizing feed-forward",
          f"{FIRST}, 3.2 and 8.2", better=_quantized("att"), worse=_quantized("ff")),
    Claim("quantizing_all_hurts_more_than_ff", "Quantizing everything hurts more than feed-forward alone",
          f"{FIRST}, 8.2", better=_quantized("ff"), worse=_quantized("all")),
    Claim("prune_int8_at_20_att_hurts_less", "Pruning 20 %, then int8: attention hurts less than feed-forward",
          f"{FIRST}, 3.3 and 8.3", better=_both("att"), worse=_both("ff"), sparsity=(0.2, 0.2)),
    Claim("prune_int8_at_40_att_hurts_less", "Pruning 40 %, then int8, in encoders and decoders: attention hurts less",
          f"{FIRST}, 8.3", better=_both("att"), worse=_both("ff"), families=(ENCODER, DECODER), sparsity=(0.4, 0.4)),
    Claim("prune_int8_at_40_reverses", "Pruning 40 %, then int8: in encoder-decoders feed-forward hurts less",
          f"{FIRST}, 8.3", better=_both("ff"), worse=_both("att"), families=(ENCODER_DECODER,), sparsity=(0.4, 0.4)),
    Claim("final_unstructured_hurts_less", "In encoders, pruning weights of the final layer hurts less than rows",
          f"{FIRST}, 3.4 and 8.4", better=_pruned("final"), worse={"compression": "structured", "target": "final"},
          families=(ENCODER,)),
    Claim("idp_at_least_equals_lora", "IDP keeps at least what LoRA keeps (within 1 point)",
          f"{SECOND}, 3.2.2", better={"recovery": "idp"}, worse={"recovery": "lora"}, margin=0.01),
    Claim("prompting_recovers", "Prompt tuning recovers accuracy over the compressed model",
          f"{SECOND}, Tables 1-2", better={"recovery": "prompt"}, worse={"recovery": "none"}),
    Claim("prefix_tuning_hurts", "Prefix tuning leaves the compressed model worse than it was",
          f"{SECOND}, 3.2.2", better={"recovery": "none"}, worse={"recovery": "prefix"}),
    Claim("redirection_wins_world_knowledge", "On world knowledge, IDP brings back more than LoRA",
          f"{SECOND}, 3.2.2", better={"recovery": "idp"}, worse={"recovery": "lora"}, tasks=WORLD),
    Claim("weights_win_language", "On language understanding, LoRA brings back more than IDP",
          f"{SECOND}, 3.2.2", better={"recovery": "lora"}, worse={"recovery": "idp"}, tasks=LANGUAGE),
    Claim("choosing_beats_joining", "Choosing a prompt (IDP) is better than joining the prompts",
          f"{SECOND}, 3.1", better={"recovery": "idp"}, worse={"recovery": "concat"}),
    Claim("quantization_keeps_more_than_pruning", "GPTQ keeps more than SparseGPT where both are recovered alike",
          f"{SECOND}, Tables 1-2", better={"compression": "gptq"}, worse={"compression": "sparsegpt"}),
)  # fmt: skip
