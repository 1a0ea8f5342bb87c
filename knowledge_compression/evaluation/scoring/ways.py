"""Whether a network supports the fast ways of scoring, found by trying them: there is no list of architectures.

Texts that lie end to end in one row, and choices that branch off one context, need a network that takes masks and
positions as they are given. One with masks of its own (attention in chunks), with recurrent state, or with an attention
function that reads no mask would answer wrongly without a word. So a few tokens are read in each way and one by one,
and a way that gives other answers is not taken.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring.questions import Blank, Question
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER
from knowledge_compression.models.targets import ReplacedLinear

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring.scorer import Scorer

log = logging.getLogger(__name__)

_CLOSE = {torch.float32: 1e-3}  # nats over a few tokens; a mask that is not obeyed costs tenths or more
_NARROW = 0.2  # for narrower types
_CONTEXTS, _FIRST_ID = (48, 20, 33), 5


class Ways(NamedTuple):
    """How texts may be read.

    Attributes:
        end_to_end: in one row, without padding.
        branching: as branches of one context, by a mask of our own.
    """

    end_to_end: bool
    branching: bool


FASTEST = Ways(end_to_end=True, branching=True)
_FOUND: dict[str, Ways] = {}  # by class and configuration of a network: what they are decides, weights do not


def ways_of(model: Model, scorer: Callable[[Ways], Scorer]) -> Ways:
    """The fastest ways in which a network answers as it does to each text by itself.

    Found once in a process for each kind of network. One whose layers have been quantized or that reads prompts answers
    by other rules too, so it is taken to be as it was when a run asked for its ways, before anything was done to it.

    Args:
        model: any family.
        scorer: gives one that takes the ways that it is told.

    Raises:
        BadInput: no way gives the answers of the network's own forward pass.
    """
    config = model.network.config
    kind = f"{type(model.network).__name__}:{hashlib.sha256(config.to_json_string().encode()).hexdigest()}"
    if kind not in _FOUND:
        if model.family == ENCODER_DECODER or not _is_plain(model):
            return FASTEST
        for found in (FASTEST, Ways(False, True), Ways(False, False)):
            holds = _holds(model, scorer(found))
            if holds is None:  # a broken network tells nothing of its kind
                return FASTEST
            if holds:
                break
        else:
            raise BadInput(
                f"{model.name} ({config.model_type}) answers otherwise through the scoring core than by its own "
                "forward pass, so nothing true could be said of it; this kind of network is not supported"
            )
        if found != FASTEST:
            log.warning("%s is read text by text: it does not answer alike when texts share a pass", model.name)
        _FOUND[kind] = found
    return _FOUND[kind]


def _is_plain(model: Model) -> bool:
    quantized = any(isinstance(module, ReplacedLinear) for module in model.network.modules())
    wrapped = not isinstance(model.network, PreTrainedModel)  # by peft, which puts soft prompts before the input
    return not (quantized or wrapped) and model.network.config._attn_implementation in ("sdpa", "eager")


def _holds(model: Model, scorer: Scorer) -> bool | None:
    """Whether a scorer answers as the network does to each text alone; None where those answers are no numbers."""
    try:
        found, expected = _answers(model, scorer)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:  # a mask of a shape it does not take
        log.debug("%s cannot be read so: %s", model.name, error)
        return False
    if not expected.isfinite().all():
        return None
    return bool(((found - expected).abs() <= _CLOSE.get(model.dtype, _NARROW)).all())


@torch.inference_mode()
def _answers(model: Model, scorer: Scorer) -> tuple[Tensor, Tensor]:
    words = min(int(model.network.config.get_text_config().vocab_size), 1000)
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(min(_FIRST_ID, words - 1), words, (count,), generator=draw).tolist()

    def alone(text: list[int]) -> Tensor:
        said = {} if model.family == ENCODER else {"use_cache": False}
        logits = model.network(input_ids=torch.tensor([text], device=model.device), **said).logits[0]
        return logits.float().log_softmax(-1).cpu()

    if model.family != DECODER:
        blanks = [Blank(text, position=len(text) // 2) for text in map(ids, _CONTEXTS)]
        rows: dict[int, Tensor] = {}
        for indices, part in scorer.distributions(blanks):
            rows |= dict(zip(indices, part.cpu(), strict=True))
        found = torch.stack([rows[i] for i in range(len(blanks))])
        likely = torch.stack([alone(list(blank.ids))[len(blank.ids) // 2] for blank in blanks])
        best = likely.topk(min(5, words)).indices  # far tails differ by rounding alone
        return found.gather(1, best), likely.gather(1, best)
    scorer.budget.pairs_per_token = float("inf")  # so that all that can branch does
    questions = [Question(context, [ids(3), ids(3), ids(1)]) for context in map(ids, _CONTEXTS)]
    found = torch.tensor([one.log_prob for answers in scorer.log_likelihoods(questions) for one in answers])
    expected = []
    for question in questions:
        for said in question.continuations:
            log_probs = alone([*question.context, *said])
            start = len(question.context) - 1
            expected.append(sum(float(log_probs[start + i, token]) for i, token in enumerate(said)))
    return found, torch.tensor(expected)
