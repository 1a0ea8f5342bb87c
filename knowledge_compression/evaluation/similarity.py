"""Cosine similarity of each layer's attention and activations to the dense model's (Hoang et al., Figure 5).

Both networks read the same windows of text. Attention weights from each input token to the input tokens that it may see
are compared per head. Attention to a prompt is left out, which only scales a row and so does not change its cosine.
Activations are the outputs of the blocks, compared per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from knowledge_compression.corpora.c4 import C4
from knowledge_compression.corpora.corpus import TEST, VALIDATION, PublishedCorpus
from knowledge_compression.corpora.wikitext import WikiText
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.suite import Evaluation, item_table
from knowledge_compression.heavy import functional, pl, torch
from knowledge_compression.identity import PLACE
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER_DECODER
from knowledge_compression.progress import shown

if TYPE_CHECKING:
    from torch import LongTensor, Tensor, nn

    from knowledge_compression.evaluation.scoring import Scorer

ATTENTION, ACTIVATION = "attention", "activation"
_TEXTS: Mapping[str, tuple[Callable[..., PublishedCorpus], str]] = {
    "wikitext": (WikiText, TEST),
    "c4": (C4, VALIDATION),
}
Seen: TypeAlias = "dict[tuple[str, str], Tensor]"  # rows to compare by cosine, by kind and layer
_OBSERVED = "observed"  # the attention function that records weights while another one computes


@dataclass(frozen=True)
class Similarity:
    """Mean cosine similarity to the dense model, layer by layer.

    Attributes:
        corpus: ``wikitext`` (WikiText-2, test) or ``c4`` (validation).
        windows: windows of text, evenly spaced.
        length: tokens in a window.
        data_dir: local files instead of the hub.
    """

    scores: ClassVar[bool] = False
    corpus: str = "wikitext"
    windows: int = 16
    length: int = 256
    data_dir: str | None = field(default=None, metadata=PLACE)

    def __post_init__(self) -> None:
        """Refuse invalid settings."""
        if self.corpus not in _TEXTS:
            raise BadInput(f"eval.similarity.corpus={self.corpus} does not exist; choose one of {', '.join(_TEXTS)}")
        for name, least in (("windows", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"eval.similarity.{name}={getattr(self, name)} must be at least {least}")

    def fingerprint(self) -> str:
        """Digest of the text that is read, or the corpus's id on the hub."""
        build, split = _TEXTS[self.corpus]
        return build(data_dir=self.data_dir).fingerprint(split)

    def check_data(self) -> None:
        """Refuse a text that is not available."""
        build, split = _TEXTS[self.corpus]
        build(data_dir=self.data_dir).check_data(split)

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Compare the model with the dense model.

        Raises:
            BadInput: the text is shorter than the windows, or the dense model cannot be loaded.
        """
        if scorer.original is None:
            raise BadInput("eval=similarity compares with the dense model, which cannot be loaded here")
        dense, model = scorer.original(), scorer.model
        if (there := _blocks(model)) != (blocks := _blocks(dense)):
            raise BadInput(f"eval=similarity compares block by block: the model has {there}, the dense one {blocks}")
        windows = self._windows(scorer)
        cosines: dict[tuple[str, str], list[float]] = {}
        for ids in shown(windows.split(1), "similarity"):
            before, after = observe(dense, ids), observe(model, ids)
            for key in before:
                first = before[key].to(after[key].device)  # they differ if the two are divided in different places
                cosine = functional.cosine_similarity(first, after[key], dim=-1)
                cosines.setdefault(key, []).append(float(cosine.mean()))
        return _evaluation(cosines, self._description(len(windows)))

    def _windows(self, scorer: Scorer) -> LongTensor:
        length = min(self.length, scorer.max_positions or self.length)
        build, split = _TEXTS[self.corpus]
        stream = build(data_dir=self.data_dir).documents(split).stream(scorer.model)
        total = len(stream) // length
        if total < self.windows:
            raise BadInput(
                f"eval.similarity.windows={self.windows}: the text of {self.corpus} has {total} windows of {length} "
                "tokens; choose fewer or shorter ones"
            )
        places = [i * total // self.windows for i in range(self.windows)]
        return stream[: total * length].view(total, length)[places]  # type: ignore[return-value]

    def _description(self, windows: int) -> dict[str, Any]:
        return {"corpus": self.corpus, "windows": windows, "length": self.length, "fingerprint": self.fingerprint()}


def _blocks(model: Model) -> int:
    return len(model.architecture.block_paths(model.network))


def observe(model: Model, ids: LongTensor) -> Seen:
    """Attention ``[heads * queries, keys]`` and activations ``[tokens, width]`` of every layer for one window."""
    seen: Seen = {}
    ids = ids.to(model.device)  # type: ignore[assignment]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.family == ENCODER_DECODER:  # the decoder reads the text too, as if it had generated it
        inputs["decoder_input_ids"] = ids
    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(_observed_attention(model.network, seen))
        for path, module in model.network.named_modules():
            if any(pile.is_block(path) for pile in model.architecture.stacks):
                stack.callback(module.register_forward_hook(_keep(seen, path)).remove)
        model.network(**inputs)
    return seen


def _add(seen: Seen, kind: str, path: str, rows: Tensor) -> None:
    """Store rows under the module's path, numbered if a shared module is used more than once (ALBERT)."""
    use = sum(1 for other, name in seen if other == kind and name.startswith(f"{path}#"))
    seen[kind, f"{path}#{use}"] = rows.flatten(0, -2).float()


def _keep(seen: Seen, path: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        _add(seen, ACTIVATION, path, states)

    return hook


@contextmanager
def _observed_attention(network: Any, seen: Seen) -> Iterator[None]:
    """Record attention weights over the input, without changing what attention computes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    paths = {module: path for path, module in network.named_modules()}
    name = network.config._attn_implementation
    answer = ALL_ATTENTION_FUNCTIONS[name]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        _add(seen, ATTENTION, paths[module], _weights(module, query, key, mask, kwargs))
        return answer(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(_OBSERVED, attention)
    AttentionMaskInterface.register(_OBSERVED, AttentionMaskInterface()[name])
    network.set_attn_implementation(_OBSERVED)
    try:
        yield
    finally:
        network.set_attn_implementation(name)


def _weights(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    """Attention weights ``[rows, heads, queries, keys]`` in float32, which fused kernels do not return."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = given.get("scaling")
    scores = (query @ key.transpose(-1, -2)).float() * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if (bias := given.get("position_bias")) is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    elif given.get("is_causal", getattr(module, "is_causal", False)) and query.shape[2] > 1:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1)


def _evaluation(cosines: Mapping[tuple[str, str], list[float]], description: dict[str, Any]) -> Evaluation:
    """Metrics ``attention`` and ``activation`` (means over layers), and ``attention.0`` ... by layer in forward order.

    Items hold the mean cosine of each layer in each window of text.
    """
    means = {key: sum(windows) / len(windows) for key, windows in cosines.items()}
    layers = {kind: [name for k, name in means if k == kind] for kind in (ATTENTION, ACTIVATION)}
    metrics = {f"{kind}.{i}": means[kind, name] for kind, names in layers.items() for i, name in enumerate(names)}
    for kind, names in layers.items():
        metrics[kind] = sum(means[kind, name] for name in names) / len(names)
    rows = [
        {"suite": "similarity", "task": kind, "id": f"{name}:{window}", "layer": i, "cosine": cosine}
        for kind, names in layers.items()
        for i, name in enumerate(names)
        for window, cosine in enumerate(cosines[kind, name])
    ]
    return Evaluation(metrics, item_table(rows, {"layer": pl.Int64(), "cosine": pl.Float64()}), description)
