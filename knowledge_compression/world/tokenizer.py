"""One vocabulary for the three families, built from a world's own words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER
from knowledge_compression.world.generator import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTINELS = tuple(f"<extra_id_{i}>" for i in range(16))
_PAD, _UNKNOWN, _BEGIN, _END, _MASK = "<pad>", "<unk>", "<s>", "</s>", "[MASK]"
_SPECIALS = [_PAD, _UNKNOWN, _BEGIN, _END, _MASK, *SENTINELS]
# The tokens at the beginning and end of each family's inputs.
_FRAMES = {ENCODER: f"{_BEGIN} $A {_END}", ENCODER_DECODER: f"$A {_END}", DECODER: f"{_BEGIN} $A"}


def train_tokenizer(world: World, family: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer for all of the world's words; ids are the same for every family."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = [name for kind in world.names.values() for name in kind]
    trainer = trainers.WordLevelTrainer(special_tokens=_SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(world.training_text() + names, trainer)
    frames = [(token, tokenizer.token_to_id(token)) for token in (_BEGIN, _END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=_FRAMES[family], special_tokens=frames)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        bos_token=_BEGIN,
        eos_token=_END,
        cls_token=_BEGIN,
        sep_token=_END,
        mask_token=_MASK,
        additional_special_tokens=list(SENTINELS),
        clean_up_tokenization_spaces=False,
    )
