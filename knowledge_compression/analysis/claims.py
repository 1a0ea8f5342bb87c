"""The claims of the papers as data: the settings or the kinds of questions compared, and the direction claimed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from knowledge_compression.analysis.measures import ANSWERS, FLIPS, KEPT, LATENCY, PERPLEXITY, SIMILARITY, Measure
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER

FIRST = "The Cost of Compression (Namburi et al., 2023)"
SECOND = "Do Compressed LLMs Forget Knowledge? (Hoang et al., 2024)"
UNICOMP = "UniComp (von Rad et al., 2026)"
NOT_ACCURACY = "Accuracy is Not All You Need (Dutta et al., 2024)"
ALL_FAMILIES = (ENCODER, ENCODER_DECODER, DECODER)
PRUNING = "magnitude"
EVERYTHING = ("all", "overall")  # the targets of a claim about the whole model
LOW, MEDIUM = (0.1, 0.3), (0.3, 0.5)  # the first paper's levels, section 3


@dataclass(frozen=True)
class Kind:
    """A kind of questions.

    Attributes:
        name: e.g. ``facts``.
        suites: the suites that ask them, each with its tasks of this kind, named by the part before their first full
        stop, as in ``derived.homeland``; none means all tasks.
    """

    name: str
    suites: Mapping[str, tuple[str, ...]]


REASONED = ("arc_easy", "arc_challenge", "winogrande")
FACTS = Kind("facts", dict.fromkeys(("atlas", "lama", "bear", "pararel", "popqa", "world"), ()))
REASONING = Kind("reasoning", {"harness": REASONED, "nine_tasks": REASONED, "world_two_hop": ("derived",)})


@dataclass(frozen=True)
class Claim:
    """ "Of two ways to treat a model, this one keeps more of it."

    Attributes:
        name: short and stable.
        text: the claim in our words.
        source: paper and section.
        better, worse: settings (``compression``, its ``bits``, ``target``, ``recovery``, ``level`` of sparsity) of the
            run that should keep more, and of the one that should keep less; ``answers: majority`` is not a run but
            always giving a task's most frequent answer.
        families: the families for which it is claimed.
        sparsity: closed range of sparsities at which pairs are formed; None uses every available pair.
        suites: the suites for which it is claimed; empty means all that have right answers.
        tasks: the tasks for which it is claimed; empty means all.
        margin: how much less (in accuracy) the better one may keep and still count as equally good; 0 claims a
            difference.
        alike: with a margin: neither may keep less than the other by more than the margin.
        parameters: range of the ratio of trained parameters, better over worse, in which pairs are formed.
        gain_over: settings of a reference run for each of the two, otherwise identical; the gains over the reference
            runs are compared instead of the values themselves.
        measure: the measure that is compared.
        kinds: two kinds of questions; the first should suffer less in the same run. The runs are then those with the
        settings ``worse``, and ``better`` stands for the dense model.
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
    alike: bool = False
    parameters: tuple[float, float] | None = None
    gain_over: Mapping[str, str] | None = None
    measure: Measure = ANSWERS
    kinds: tuple[Kind, Kind] | None = None


FEWER, MORE = (0, 0.6), (1 / 0.6, float("inf"))  # parameters: clearly fewer or more were trained


def _pruned(target: str) -> dict[str, str]:
    return {"compression": PRUNING, "target": target}


def _quantized(target: str) -> dict[str, str]:
    return {"compression": "int8_dynamic", "target": target}


def _both(target: str) -> dict[str, str]:
    return {"compression": "prune_int8", "target": target}


def _recovered(compression: str, recovery: str) -> dict[str, str]:
    return {"compression": compression, "recovery": recovery}


WORLD = ("arc_easy", "arc_challenge", "sciq", "webqs", "triviaqa", "triviaqa_greedy")
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
    Claim("pruning_nearly_all_leaves_nothing",
          "Pruning 90 % of everything leaves nothing over the majority baseline (within 2 points)", f"{FIRST}, 8.1",
          better={"answers": "majority"}, worse=_pruned("all"), sparsity=(0.9, 0.9), margin=0.02),
    Claim("quantizing_att_hurts_less", "Quantizing attention to int8 hurts less than quantizing feed-forward",
          f"{FIRST}, 3.2 and 8.2", better=_quantized("att"), worse=_quantized("ff")),
    Claim("quantizing_all_hurts_more_than_ff", "Quantizing everything hurts more than feed-forward alone",
          f"{FIRST}, 8.2", better=_quantized("ff"), worse=_quantized("all")),
    Claim("quantizing_all_hurts_more_than_att", "Quantizing everything hurts more than attention alone",
          f"{FIRST}, 8.2", better=_quantized("att"), worse=_quantized("all")),
    Claim("quantizing_is_like_medium_pruning",
          "Quantizing to int8 keeps about what pruning 30-50 % of the same target keeps (within 2 points)",
          f"{FIRST}, 8.2", better={"compression": "int8_dynamic"}, worse={"compression": PRUNING}, sparsity=MEDIUM,
          margin=0.02, alike=True),
    Claim("prune_int8_at_20_att_hurts_less", "Pruning 20 %, then int8: attention hurts less than feed-forward",
          f"{FIRST}, 3.3 and 8.3", better=_both("att"), worse=_both("ff"), sparsity=(0.2, 0.2)),
    Claim("prune_int8_at_40_att_hurts_less", "Pruning 40 %, then int8, in encoders and decoders: attention hurts less",
          f"{FIRST}, 8.3", better=_both("att"), worse=_both("ff"), families=(ENCODER, DECODER), sparsity=(0.4, 0.4)),
    Claim("prune_int8_at_40_reverses", "Pruning 40 %, then int8: in encoder-decoders feed-forward hurts less",
          f"{FIRST}, 8.3", better=_both("ff"), worse=_both("att"), families=(ENCODER_DECODER,), sparsity=(0.4, 0.4)),
    Claim("prune_int8_cross_att_hurts_more",
          "Pruning, then int8, in encoder-decoders: cross-attention hurts more than self-attention",
          f"{FIRST}, 8.3 and Figure 8", better=_both("self_att"), worse=_both("cross_att"),
          families=(ENCODER_DECODER,)),
    Claim("final_at_20_leaves_the_majority",
          "In decoders and encoder-decoders, pruning 20 % of the final layer leaves little over the majority baseline "
          "(within 2 points)", f"{FIRST}, 8.4", better={"answers": "majority"}, worse=_pruned("final"),
          families=(ENCODER_DECODER, DECODER), sparsity=(0.2, 0.2), margin=0.02),
    Claim("final_unstructured_hurts_less", "In encoders, pruning weights of the final layer hurts less than rows",
          f"{FIRST}, 3.4 and 8.4", better=_pruned("final"), worse={"compression": "structured", "target": "final"},
          families=(ENCODER,)),
    Claim("gptq_8_bits_is_harmless", "GPTQ to 8 bits costs nothing (within 1 point of the dense accuracy)",
          f"{SECOND}, 2.1 and Figure 1", better={"compression": "gptq", "bits": "8", "recovery": "none"},
          worse={"compression": "none", "recovery": "none"}, margin=0.01),
    Claim("fewer_bits_hurt", "GPTQ to 3 bits hurts more than to 4 bits", f"{SECOND}, 2.1 and Figure 1",
          better={"compression": "gptq", "bits": "4", "recovery": "none"},
          worse={"compression": "gptq", "bits": "3", "recovery": "none"}),
    Claim("more_sparsity_hurts", "SparseGPT past 50 % hurts more than up to 50 %", f"{SECOND}, 2.1 and Figure 1",
          better={"compression": "sparsegpt", "recovery": "none", "level": "up to 0.5"},
          worse={"compression": "sparsegpt", "recovery": "none", "level": "past 0.5"}),
    Claim("idp_at_least_equals_lora",
          "With at most a quarter of its trained parameters, IDP keeps at least what LoRA keeps (within 1 point)",
          f"{SECOND}, 3.2.2 and 3.3", better={"recovery": "idp"}, worse={"recovery": "lora"}, margin=0.01,
          parameters=(0, 0.25)),
    Claim("lora_recovers", "LoRA recovers accuracy over the compressed model",
          f"{SECOND}, Tables 1-2", better={"recovery": "lora"}, worse={"recovery": "none"}),
    Claim("idp_recovers", "IDP recovers accuracy over the compressed model",
          f"{SECOND}, Tables 1-2", better={"recovery": "idp"}, worse={"recovery": "none"}),
    Claim("prompting_recovers", "Prompt tuning recovers accuracy over the compressed model",
          f"{SECOND}, Tables 1-2", better={"recovery": "prompt"}, worse={"recovery": "none"}),
    Claim("prefix_tuning_hurts", "Prefix tuning leaves the compressed model worse than it was",
          f"{SECOND}, 3.2.2", better={"recovery": "none"}, worse={"recovery": "prefix"}),
    Claim("redirection_wins_world_knowledge", "On world knowledge, IDP brings back more than LoRA",
          f"{SECOND}, 3.2.2", better={"recovery": "idp"}, worse={"recovery": "lora"}, tasks=WORLD),
    Claim("weights_win_language", "On language understanding, LoRA brings back more than IDP",
          f"{SECOND}, 3.2.2", better={"recovery": "lora"}, worse={"recovery": "idp"}, tasks=LANGUAGE),
    Claim("idp_lacks_little_on_language",
          "On language understanding, where LoRA brings back more, IDP is less than 0.2 points behind",
          f"{SECOND}, 3.2.2", better={"recovery": "idp"}, worse={"recovery": "lora"}, tasks=LANGUAGE, margin=0.002),
    Claim("short_prompts_are_as_good", "A shorter prompt keeps as much as a longer one (within 1 point)",
          f"{SECOND}, 3.1 and Figure 2", better={"recovery": "prompt"}, worse={"recovery": "prompt"}, margin=0.01,
          parameters=FEWER),
    Claim("longer_prompts_help_perplexity", "A longer prompt gives a better perplexity than a shorter one",
          f"{SECOND}, 3.1 and Figure 2", better={"recovery": "prompt"}, worse={"recovery": "prompt"}, parameters=MORE,
          measure=PERPLEXITY),
    Claim("idp_is_stable_over_sizes", "IDP keeps the same whatever the size of its prompts (within 1 point)",
          f"{SECOND}, 3.3 and Figure 6", better={"recovery": "idp"}, worse={"recovery": "idp"}, margin=0.01, alike=True,
          parameters=FEWER),
    Claim("choosing_beats_joining", "Choosing a prompt (IDP) is better than joining the prompts",
          f"{SECOND}, 3.1", better={"recovery": "idp"}, worse={"recovery": "concat"}),
    Claim("quantization_keeps_more_than_pruning",
          "GPTQ to 3 bits keeps more than SparseGPT up to 50 % where both are recovered alike",
          f"{SECOND}, Tables 1-2", better={"compression": "gptq", "bits": "3"},
          worse={"compression": "sparsegpt", "level": "up to 0.5"}),
    Claim("quantization_recovers_more_than_pruning",
          "A recovery adds more to a model after GPTQ to 3 bits than after SparseGPT up to 50 %",
          f"{SECOND}, 3.2.2", better={"compression": "gptq", "bits": "3"},
          worse={"compression": "sparsegpt", "level": "up to 0.5"}, gain_over={"recovery": "none"}),
    *(
        claim
        for recovery, called in (("prompt", "A prompt"), ("idp", "IDP"))
        for claim in (
            Claim(f"{recovery}_turns_attention", f"{called} turns attention further from the dense model's than LoRA",
                  f"{SECOND}, 4.1 and Figure 5", better={"recovery": "lora"}, worse={"recovery": recovery},
                  tasks=("attention",), measure=SIMILARITY),
            Claim(f"{recovery}_keeps_activations",
                  f"{called} keeps activations as near to the dense model's as LoRA (within 2 hundredths of cosine)",
                  f"{SECOND}, 4.1 and Figure 5", better={"recovery": recovery}, worse={"recovery": "lora"},
                  tasks=("activation",), measure=SIMILARITY, margin=0.02, alike=True),
            Claim(f"{recovery}_is_faster_than_lora", f"{called} reads a batch faster than LoRA", f"{SECOND}, 3.3",
                  better={"recovery": recovery}, worse={"recovery": "lora"}, tasks=("prefill",), measure=LATENCY),
        )
    ),
    Claim("prefix_keeps_attention", "Prefix tuning keeps attention nearer to the dense model's than a prompt",
          f"{SECOND}, 4.1 and Figure 5", better={"recovery": "prefix"}, worse={"recovery": "prompt"},
          tasks=("attention",), measure=SIMILARITY),
    Claim("eight_bits_flip_little",
          "What accuracy suggests and the paper denies: 8 bits leave the answers as they were (within 1 % flips)",
          NOT_ACCURACY, better={"bits": "8", "recovery": "none"}, worse={"compression": "none", "recovery": "none"},
          margin=0.01, measure=FLIPS),
    Claim("fewer_bits_flip_more", "4 bits flip more answers than 8 bits by the same method", NOT_ACCURACY,
          better={"bits": "8", "recovery": "none"}, worse={"bits": "4", "recovery": "none"}, measure=FLIPS),
    Claim("facts_outlast_reasoning",
          "The same compression leaves more of factual recall than of reasoning (each above chance, as a share of the "
          "dense model's)", UNICOMP, better={"compression": "none", "recovery": "none"}, worse={"recovery": "none"},
          measure=KEPT, kinds=(FACTS, REASONING)),
    Claim("prefix_turns_activations", "Prefix tuning turns activations further from the dense model's than a prompt",
          f"{SECOND}, 4.1 and Figure 5", better={"recovery": "prompt"}, worse={"recovery": "prefix"},
          tasks=("activation",), measure=SIMILARITY),
)  # fmt: skip
