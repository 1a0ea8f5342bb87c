"""The time to read a batch and to generate one more token, and the memory needed.

The second paper compares prompts with LoRA at batch 16 and 1,024 tokens (Hoang et al., section 3.3).
"""

from __future__ import annotations

import gc
import inspect
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from knowledge_compression.building import Seed
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.suite import Evaluation, item_table
from knowledge_compression.heavy import pl, torch
from knowledge_compression.memory import Peak, peak_memory
from knowledge_compression.models import Model
from knowledge_compression.models.caches import cache_of
from knowledge_compression.models.families import DECODER, ENCODER
from knowledge_compression.progress import shown
from knowledge_compression.timing import timed

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.evaluation.scoring import Scorer

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Latency:
    """Inference time on random tokens after warm-up: median and spread over repeats.

    *Prefill* reads the batch and computes the logits of each row's last token (encoders: of all tokens), filling the
    cache if there is one. *Decode* then generates ``decode_tokens`` more tokens, one at a time, using the cache; its
    time is that of one token for the whole batch. Encoders and networks without a cache have no decode.

    Attributes:
        batch: number of rows.
        length: tokens per row.
        decode_tokens: tokens generated after each prefill.
        repeats: number of measured repeats.
        warmup: number of unmeasured repeats before them.
        seed: for the random tokens.
    """

    scores: ClassVar[bool] = False
    batch: int = 16
    length: int = 1024
    decode_tokens: int = 16
    repeats: int = 5
    warmup: int = 1
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Refuse numbers below their minimum."""
        for name, least in (("batch", 1), ("length", 1), ("decode_tokens", 1), ("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise BadInput(f"eval.latency.{name}={getattr(self, name)} must be at least {least}")

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Measure.

        Raises:
            BadInput: the rows do not fit the model's positions.
        """
        model, limit = scorer.model, scorer.max_positions
        said = self.decode_tokens if model.family == DECODER else 0
        if limit is not None and self.length + said > limit:
            raise BadInput(
                f"eval.latency.length={self.length} and {said} more tokens do not fit the {limit} positions of "
                f"{model.name}; choose a length of {max(limit - said, 0)} or less"
            )
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(len(model.tokenizer), (self.batch, self.length), generator=generator).to(model.device)
        seconds: dict[str, list[float]] = {}
        gc.collect()
        with torch.inference_mode(), peak_memory(model.device) as memory:
            for repeat in shown(range(-self.warmup, self.repeats), "latency"):
                for name, value in self._once(model, ids).items():
                    if repeat >= 0:
                        seconds.setdefault(name, []).append(value)
        return Evaluation(_metrics(seconds, memory), _items(seconds), self._description(model, memory))

    def _once(self, model: Model, ids: Tensor) -> dict[str, float]:
        network = model.network
        if model.family == ENCODER:
            return {PREFILL: timed(model.device, lambda: network(input_ids=ids))[0]}
        fields: dict[str, Any] = {"use_cache": True}
        if model.family == DECODER:
            said = "input_ids"
            if "logits_to_keep" in inspect.signature(network.forward).parameters:
                fields["logits_to_keep"] = 1  # as in generation
            prefill, output = timed(model.device, lambda: network(input_ids=ids, **fields))
        else:
            said = "decoder_input_ids"
            start = torch.full_like(ids[:, :1], model.decoder_start)
            prefill, output = timed(model.device, lambda: network(input_ids=ids, decoder_input_ids=start, **fields))
            fields["encoder_outputs"] = (output.encoder_last_hidden_state,)

        if not cache_of(output):
            return {PREFILL: prefill}

        def decode(output: Any) -> Any:
            for _ in range(self.decode_tokens):
                token = output.logits[:, -1:].argmax(-1)
                output = network(**{said: token}, **cache_of(output), **fields)
            return output

        decoding, _ = timed(model.device, lambda: decode(output))
        return {PREFILL: prefill, DECODE: decoding / self.decode_tokens}

    def _description(self, model: Model, memory: Peak) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "length": self.length,
            "decode_tokens": self.decode_tokens,
            "repeats": self.repeats,
            "warmup": self.warmup,
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "memory": memory.source,
        }


def _metrics(seconds: Mapping[str, list[float]], memory: Peak) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, values in seconds.items():
        metrics |= {
            f"{name}_seconds": statistics.median(values),
            f"{name}_seconds_min": min(values),
            f"{name}_seconds_max": max(values),
        }
    return metrics | ({"peak_memory": float(memory.bytes)} if memory.bytes is not None else {})


def _items(seconds: Mapping[str, list[float]]) -> pl.DataFrame:
    rows = [
        {"suite": "latency", "task": name, "id": f"{name}:{repeat}", "seconds": value}
        for name, values in seconds.items()
        for repeat, value in enumerate(values)
    ]
    return item_table(rows, {"seconds": pl.Float64()})
