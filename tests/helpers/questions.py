"""Questions to score, and the plain way to score them that shares nothing with the scoring core."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from helpers.networks import FAMILY, SPECIAL, TINY, VOCABULARY
from knowledge_compression.evaluation.scoring import Question, Scorer
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER

CONTINUING = [name for name in TINY if FAMILY[name] != ENCODER]


@torch.no_grad()
def plainly(model: Model, question: Question) -> list[tuple[float, bool]]:
    """Each continuation in a pass of its own, with the network's own mask, positions and head."""
    answers = []
    for answer in question.continuations:
        gold = torch.tensor([list(answer)])
        if model.family == DECODER:
            ids = torch.tensor([[*question.context, *answer]])
            logits = model.network(input_ids=ids).logits[:, len(question.context) - 1 : -1]
        else:
            ids = torch.tensor([list(question.context)])
            logits = model.network(input_ids=ids, labels=gold).logits
        log_probs = logits.log_softmax(-1)
        answers.append((float(log_probs.gather(-1, gold[..., None]).sum()), bool((log_probs.argmax(-1) == gold).all())))
    return answers


def random_questions(seed: int, count: int = 12) -> list[Question]:
    """Questions of unlike lengths; some share their beginning, some choices begin alike or are alike."""
    draw = random.Random(seed)
    prefix = tokens(draw, 14)
    questions = []
    for _ in range(count):
        context = tokens(draw, draw.randint(1, 30))
        if draw.random() < 0.4:
            context = prefix + context
        stem = tokens(draw, draw.randint(0, 4))
        choices = [stem + tokens(draw, draw.randint(1, 9)) for _ in range(draw.randint(1, 5))]
        if draw.random() < 0.3:
            choices = [choice[:1] for choice in choices]
        if draw.random() < 0.2:
            choices.append(choices[0])
        questions.append(Question(context, choices))
    return questions


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(len(SPECIAL), VOCABULARY) for _ in range(count)]


def assert_equals_plain(model: Model, questions: Sequence[Question], **scorer: int) -> None:
    for question, found in zip(questions, Scorer(model, **scorer).log_likelihoods(questions), strict=True):
        for (log_prob, greedy), answer in zip(plainly(model, question), found, strict=True):
            assert answer.log_prob == pytest.approx(log_prob, rel=1e-4, abs=1e-5)
            assert answer.greedy == greedy
