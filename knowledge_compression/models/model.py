"""The value on which every step of a run works: a language model with its tokenizer and settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import nn, torch
from knowledge_compression.models.families import ENCODER_DECODER, Architecture, architecture_of
from knowledge_compression.models.spread import is_spread, main_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from knowledge_compression.models.checkpoints.base import StoredAs


@dataclass
class Model:
    """A loaded language model.

    Attributes:
        network: the transformers model in evaluation mode; compression changes it in place and recovery may wrap it.
        tokenizer: its tokenizer.
        name: the name shown to users, e.g. ``smollm2``.
        provenance: the origin of the weights (hub id and commit, file and digest), for the record.
        note: a remark for readers about this baseline, e.g. that it was stored in 4 bits; may be empty.
        objective: the training objective, which recoveries use too; None uses its family's (see
            ``objectives.objective_for``).
        on_disk: how the weights were stored in their source, if in a compressed format.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    provenance: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    objective: Any = field(default=None, repr=False)
    on_disk: StoredAs | None = None

    @property
    def architecture(self) -> Architecture:
        """The architecture of the network: its family, blocks and final layer."""
        return architecture_of(self.network)

    @property
    def family(self) -> str:
        """``encoder``, ``encoder_decoder`` or ``decoder``."""
        return self.architecture.family

    @property
    def device(self) -> torch.device:
        """The device of the parameters; of a network divided over several, the one that reads its input."""
        return main_device(self.network) if is_spread(self.network) else next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: that of the input embeddings; a recovery may add parameters of another dtype."""
        return next(self.network.get_input_embeddings().parameters()).dtype

    @property
    def text_config(self) -> Any:
        """The configuration of the part that reads text, inside that of a multimodal network; in an encoder-decoder, of
        the part that generates text."""
        config = self.network.config
        return config.get_text_config(decoder=True) if self.family == ENCODER_DECODER else config.get_text_config()

    @property
    def decoder_start(self) -> int:
        """The token with which an encoder-decoder begins to generate, found as transformers' own generation finds it.

        Raises:
            BadInput: its settings define none.
        """
        settings = self.network.generation_config, self.network.config, self.text_config
        for name in ("decoder_start_token_id", "bos_token_id"):
            for where in settings:
                if (token := getattr(where, name, None)) is not None:
                    return int(token)
        raise BadInput(
            f"{self.name} does not define the token with which its decoder begins; set decoder_start_token_id in its "
            "config.json (for a translation model, the token of the language)"
        )

    @property
    def max_positions(self) -> int | None:
        """Longest input in tokens; None if positions are unlimited (T5)."""
        config = self.network.config if self.family == ENCODER_DECODER else self.text_config
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None:
            limit = getattr(config, "n_positions", None) if self.family != ENCODER_DECODER else None
        return None if limit is None else limit - self.first_position

    @property
    def first_position(self) -> int:
        """Position number of a text's first token."""
        positions = [m for path, m in self.network.named_modules() if path.endswith("position_embeddings")]
        after_padding = any(getattr(module, "padding_idx", None) is not None for module in positions)  # as in RoBERTa
        return self.network.config.pad_token_id + 1 if after_padding else 0

    def parameter_count(self) -> int:
        """Number of distinct parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def head_is_tied(self) -> bool:
        """Whether the final layer's weight is that of embeddings: those of the input, or of the decoder."""
        head = self.network.get_submodule(self.architecture.final)
        embeddings = (module for module in self.network.modules() if isinstance(module, nn.Embedding))
        return isinstance(head, nn.Linear) and any(head.weight is module.weight for module in embeddings)

    def untie_head(self) -> None:
        """Give the final layer its own weight, so that compressing it does not change the embeddings.

        The weight stays untied after ``tie_weights()``, which lm-eval's ``HFLM`` calls. Does nothing if nothing is
        tied.
        """
        if not self.head_is_tied:
            return
        head: Any = self.network.get_submodule(self.architecture.final)
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        self.keep_head_untied()

    def keep_head_untied(self) -> None:
        """Prevent ``tie_weights()`` from changing the final layer."""
        self.network.config.tie_word_embeddings = False
        tied = f"{self.architecture.final}.weight"
        self.network.all_tied_weights_keys = {
            target: source for target, source in self.network.all_tied_weights_keys.items() if target != tied
        }
