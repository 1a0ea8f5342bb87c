"""Several corpora as one, each with its share of the windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from knowledge_compression.corpora.corpus import Corpus, Windowed
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.identity import LABEL
from knowledge_compression.models import Model

if TYPE_CHECKING:
    from torch import LongTensor


@dataclass(frozen=True)
class Mix(Windowed):
    """A mix of corpora, by weights.

    Every source gives windows in proportion to its weight; the remainder of the division goes to the largest fractions.
    The windows are drawn as the source draws them, and shuffled, both with the seed of the mix. For tuning, the sources
    form the longest stream in which they have their shares and no text is repeated.

    Attributes:
        sources: corpora by names that the user gives; their ``samples``, ``length`` and ``seed`` are those of the mix.
        weights: the share of each, by the same names; they need not add up to one.
    """

    name: str = field(default="mix", metadata=LABEL)
    sources: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse empty mixes, and weights that are not positive."""
        super().__post_init__()
        if not self.sources:
            raise BadInput("corpus.sources is empty; name at least one corpus, see conf/corpus/mix.yaml")
        if self.sources.keys() != self.weights.keys():
            odd = sorted(self.sources.keys() ^ self.weights.keys())
            raise BadInput(
                f"corpus.weights and corpus.sources name different corpora: {', '.join(odd)} is in one of them"
            )
        for source, weight in self.weights.items():
            if not weight > 0:
                raise BadInput(f"corpus.weights.{source}={weight} is not a weight; give a number above 0")
        if self.samples < len(self.sources):
            raise BadInput(f"corpus.samples={self.samples} is too small for {len(self.sources)} sources")

    @property
    def parts(self) -> dict[str, Any]:
        """The sources, each with its own number of windows."""
        whole = sum(self.weights.values())
        exact = {name: self.samples * self.weights[name] / whole for name in self.sources}
        counts = {name: int(value) for name, value in exact.items()}
        order = sorted(exact, key=lambda name: (counts[name] - exact[name], list(exact).index(name)))
        for name in order[: self.samples - sum(counts.values())]:
            counts[name] += 1
        if empty := [name for name, count in counts.items() if not count]:
            raise BadInput(
                f"corpus.weights.{empty[0]}={self.weights[empty[0]]} gives it none of {self.samples} windows; "
                "raise it, or corpus.samples"
            )
        return {
            name: replace(source, samples=counts[name], length=self.length, seed=self.seed)
            for name, source in self.sources.items()
        }

    def fingerprint(self) -> str:
        """The version of the mixing; each source has a digest of its own."""
        return "mix-1"

    def check_data(self) -> None:
        """Refuse a source whose text is not available."""
        for source in self.parts.values():
            if hasattr(source, "check_data"):
                source.check_data()

    def prepared(self, model: Model) -> Corpus:
        """The mix with every source prepared."""
        prepared = {name: source.prepared(model) for name, source in self.parts.items()}
        return _Prepared(self.name, self.samples, self.length, self.seed, prepared, self.weights)

    def windows(self, model: Model) -> LongTensor:
        """Calibration windows ``[samples, length]``."""
        return self.prepared(model).windows(model)

    def token_stream(self, model: Model) -> LongTensor:
        """Running text, ``[tokens]``."""
        return self.prepared(model).token_stream(model)


class _Prepared(Mix):
    """A mix whose sources are prepared and have their numbers of windows."""

    @property
    def parts(self) -> dict[str, Any]:
        return dict(self.sources)

    def prepared(self, model: Model) -> Corpus:
        return self

    def windows(self, model: Model) -> LongTensor:
        rows = torch.cat([source.windows(model) for source in self.sources.values()])
        return rows[self._order(len(rows))]  # type: ignore[return-value]

    def token_stream(self, model: Model) -> LongTensor:
        streams = {name: source.token_stream(model) for name, source in self.sources.items()}
        windows = {name: stream[: len(stream) // self.length * self.length] for name, stream in streams.items()}
        for name, stream in windows.items():
            if not len(stream):
                raise BadInput(f"corpus.sources.{name} has less than a window of {self.length} tokens")
        scale = min(len(stream) / self.weights[name] for name, stream in windows.items()) / self.length
        rows = torch.cat(
            [
                stream.view(-1, self.length)[: max(1, round(scale * self.weights[name]))]
                for name, stream in windows.items()
            ]
        )
        return rows[self._order(len(rows))].flatten()  # type: ignore[return-value]

    def _order(self, count: int) -> Any:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
