"""The cloze engine against plain, slow readings of the same models."""

from __future__ import annotations

import pytest
import torch

from knowledge_compression.evaluation.scoring import Blank, Scorer

ENCODERS = ["albert", "bert", "distilbert", "electra", "roberta"]
SENTENCES = [
    "paris is the capital of [MASK] .",
    "the [MASK] is a wolf and a dog and cat .",
    "[MASK] wrote the book .",
]


@pytest.mark.parametrize("architecture", ENCODERS)
def test_the_head_sees_only_masked_positions_and_says_the_same(architecture, tiny_model):
    model = tiny_model(architecture)
    blanks = []
    for sentence in SENTENCES:
        ids = model.tokenizer(sentence)["input_ids"]
        blanks.append(Blank(ids, ids.index(model.tokenizer.mask_token_id)))
    head = model.network.get_submodule(model.architecture.final)
    seen = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    scored = {}
    for indices, log_probs in Scorer(model).distributions(blanks):
        scored |= dict(zip(indices, log_probs, strict=True))
    hook.remove()
    assert sum(seen) == len(blanks) * head.in_features
    for i, blank in enumerate(blanks):
        with torch.no_grad():
            logits = model.network(torch.tensor([blank.ids])).logits[0, blank.position]
        torch.testing.assert_close(scored[i], logits.log_softmax(-1), atol=1e-5, rtol=1e-5)
