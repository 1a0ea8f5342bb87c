"""The fast ways of scoring that a network supports, found by trying them rather than from a list of architectures.

Texts end to end in one row, choices that branch from one context, and rows that are padded to one length need a network
that obeys the masks and positions that it is given. A network with its own masks (chunked attention), with recurrent
state, or with an attention function that ignores masks would silently give wrong answers. A few tokens are therefore
read in each way and separately, and a way that gives different answers is not used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring.questions import Blank, Question
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER
from knowledge_compression.models.replaced import ReplacedLinear

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring.scorer import Scorer

log = logging.getLogger(__name__)

_CLOSE = {torch.float32: 1e-3}  # nats over a few tokens; an ignored mask changes tenths or more
_NARROW = 0.2  # for narrower types
_CONTEXTS, _FIRST_ID = (48, 20, 33), 5


class Ways(NamedTuple):
    """The ways in which texts may share a forward pass.

    Attributes:
        end_to_end: in one row, without padding.
        branching: as branches of one context, by a mask of our own.
        padded: in rows that padding makes equally long.
    """

    end_to_end: bool
    branching: bool
    padded: bool = True


FASTEST = Ways(end_to_end=True, branching=True)
_SLOWER = (Ways(False, True), Ways(False, False), Ways(False, False, padded=False))
_FOUND: dict[str, Ways] = {}  # by class and configuration of a network, not by its weights


def ways_of(model: Model, scorer: Callable[[Ways], Scorer]) -> Ways:
    """The fastest ways in which a network gives the same answers as for each text separately.

    Determined once per process for each kind of network, before it is compressed or recovered: quantized layers and
    prompts change the answers for other reasons.

    Args:
        model: any family.
        scorer: builds a scorer that uses the given ways.

    Raises:
        BadInput: no way reproduces the answers of the network's own forward pass.
    """
    config = model.network.config
    kind = f"{type(model.network).__name__}:{hashlib.sha256(config.to_json_string().encode()).hexdigest()}"
    if kind not in _FOUND:
        if not _is_plain(model):
            return FASTEST
        for found in (FASTEST, *(_SLOWER[2:] if model.family == ENCODER_DECODER else _SLOWER)):
            holds = _holds(model, scorer(found))
            if holds is None:  # a damaged network tells nothing about its kind
                return FASTEST
            if holds:
                break
        else:
            raise BadInput(
                f"{model.name} ({config.model_type}) gives different answers through the scoring core and through its "
                "own forward pass, so no result would be valid; this kind of network is not supported"
            )
        if found != FASTEST:
            log.warning(
                "%s is scored one text at a time: its answers change when texts share a forward pass", model.name
            )
        _FOUND[kind] = found
    return _FOUND[kind]


def _is_plain(model: Model) -> bool:
    quantized = any(isinstance(module, ReplacedLinear) for module in model.network.modules())
    wrapped = not isinstance(model.network, PreTrainedModel)  # by peft, which places soft prompts before the input
    return not (quantized or wrapped) and model.network.config._attn_implementation in ("sdpa", "eager")


def _holds(model: Model, scorer: Scorer) -> bool | None:
    """Whether a scorer gives the same log-probabilities as the network for each text; None if those are not finite."""
    try:
        found, expected = _answers(model, scorer)
    except BadInput:  # its own message is clear
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:  # this mask is refused
        log.debug("%s cannot be read so: %s", model.name, error)
        return False
    if not expected.isfinite().all():
        return None
    return bool(((found - expected).abs() <= _CLOSE.get(model.dtype, _NARROW)).all())


@torch.inference_mode()
def _answers(model: Model, scorer: Scorer) -> tuple[Tensor, Tensor]:
    words = min(int(model.text_config.vocab_size), 1000)
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(min(_FIRST_ID, words - 1), words, (count,), generator=draw).tolist()

    def alone(text: list[int], **inputs: Any) -> Tensor:
        logits = model.network(input_ids=torch.tensor([text], device=model.device), **inputs).logits[0]
        return logits.float().log_softmax(-1).cpu()

    if model.family == ENCODER:
        blanks = [Blank(text, position=len(text) // 2) for text in map(ids, _CONTEXTS)]
        rows: dict[int, Tensor] = {}
        for indices, part in scorer.distributions(blanks):
            rows |= dict(zip(indices, part.cpu(), strict=True))
        found = torch.stack([rows[i] for i in range(len(blanks))])
        likely = torch.stack([alone(list(blank.ids))[len(blank.ids) // 2] for blank in blanks])
        best = likely.topk(min(5, words)).indices  # far tails of distributions differ by rounding
        return found.gather(1, best), likely.gather(1, best)

    def read_alone(context: Sequence[int], said: Sequence[int]) -> float:
        if model.family == DECODER:
            log_probs = alone([*context, *said], use_cache=False)[len(context) - 1 :]
        else:
            begun = torch.tensor([[model.decoder_start, *said[:-1]]], device=model.device)
            log_probs = alone(list(context), decoder_input_ids=begun, use_cache=False)
        return sum(float(row[token]) for row, token in zip(log_probs, said, strict=False))

    scorer.budget.pairs_per_token = float("inf")  # high enough that everything that can branch does
    questions = [Question(context, [ids(3), ids(3), ids(1)]) for context in map(ids, _CONTEXTS)]
    found = torch.tensor([one.log_prob for answers in scorer.log_likelihoods(questions) for one in answers])
    expected = [read_alone(question.context, said) for question in questions for said in question.continuations]
    return found, torch.tensor(expected)
