"""The model's own samples: calibration and tuning text for a model whose data is not at hand.

Data-free calibration from a model's own generations follows LLM-QAT [Liu et al., 2023, section 2.1]; masked language
models are sampled as Wang & Cho [2019] do. Everything is drawn at temperature 1 from the whole vocabulary without its
special tokens, from the model as it was loaded, in batches, with the corpus's seed.

- A decoder continues what its tokenizer puts before a text (a BOS token), or, where that is nothing, one token drawn
  uniformly from the vocabulary.
- An encoder-decoder grows a text: the encoder reads the text so far and a blank (T5's first sentinel, BART's mask), the
  decoder fills the blank until it says a special token, and what it said is appended.
- An encoder starts from masks between its own CLS and SEP and fills them in random order, an equal share in each of 16
  rounds, every token drawn from its distribution given those already there.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import LongTensor, Tensor

from knowledge_compression.cache import cached_folder
from knowledge_compression.corpora.corpus import Corpus, Windowed, check_fits
from knowledge_compression.errors import BadInput
from knowledge_compression.identity import LABEL
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER
from knowledge_compression.models.streamed import StreamedModel
from knowledge_compression.progress import shown

log = logging.getLogger(__name__)

VERSION = "own-samples-1"  # raised when the same model and seed would give other samples
_BATCH = 32  # sequences sampled side by side; part of what decides the draw
_ROUNDS = 16  # an encoder's masks are filled in so many forward passes
_CONTEXT = 128  # tokens of the text so far that an encoder-decoder rereads for each blank
_SPAN = 32  # longest filling of one blank


@dataclass(frozen=True)
class OwnSamples(Windowed):
    """Text that the model itself writes; kept in the cache for the next run of the same model."""

    name: str = field(default="self", metadata=LABEL)
    samples: int = 32
    length: int = 256

    def fingerprint(self) -> str:
        """The way of drawing; the model that draws is in the run's hash already."""
        return VERSION

    def prepared(self, model: Model) -> Corpus:
        """The samples of ``model`` as it is now, so that they are those of the uncompressed model.

        Raises:
            BadInput: the windows are longer than the model's positions, or its weights are not in memory.
        """
        check_fits(model, self.length)
        if isinstance(model, StreamedModel):
            raise BadInput("corpus=self is written by the whole model, which model.stream=true never loads; try c4")
        identity = f"{VERSION}:{self.samples}:{self.length}:{self.seed}:{model.device.type}:{_weights_digest(model)}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        folder = cached_folder(f"self/{name}", partial(self._write, model))
        ids = load_file(folder / "ids.safetensors")["ids"]
        return DrawnSamples(self.name, self.samples, self.length, self.seed, ids=ids)  # type: ignore[arg-type]

    def windows(self, model: Model) -> LongTensor:
        """Samples ``[samples, length]`` of ``model`` as it is now."""
        return self.prepared(model).windows(model)

    def token_stream(self, model: Model) -> LongTensor:
        """The same samples one after the other, ``[samples * length]``."""
        return self.prepared(model).token_stream(model)

    def _write(self, model: Model, folder: Path) -> None:
        save_file({"ids": own_samples(model, self.samples, self.length, self.seed)}, folder / "ids.safetensors")


@dataclass(frozen=True)
class DrawnSamples(Windowed):
    """Samples already written, independent of later changes to the model.

    Attributes:
        ids: token ids ``[samples, length]``.
    """

    ids: LongTensor = field(kw_only=True)

    def fingerprint(self) -> str:
        """The way of drawing."""
        return VERSION

    def prepared(self, model: Model) -> Corpus:
        """Itself."""
        return self

    def windows(self, model: Model) -> LongTensor:
        """The samples ``[samples, length]``."""
        return self.ids

    def token_stream(self, model: Model) -> LongTensor:
        """The samples one after the other."""
        return self.ids.flatten()  # type: ignore[return-value]


@torch.inference_mode()
def own_samples(model: Model, samples: int, length: int, seed: int) -> LongTensor:
    """Let a model write.

    Returns:
        Token ids ``[samples, length]`` on the CPU, the same for the same seed on the same kind of device.
    """
    write = {DECODER: _continue, ENCODER_DECODER: _fill_blanks, ENCODER: _unmask}[model.family]
    sampler = _Sampler(model, seed)
    starts = range(0, samples, _BATCH)
    log.info("%s writes %d samples of %d tokens to calibrate on", model.name, samples, length)
    batches = [write(model, sampler, min(_BATCH, samples - start), length) for start in starts]
    return torch.cat(batches).cpu()  # type: ignore[return-value]


class _Sampler:
    """Draws tokens of the ordinary vocabulary."""

    def __init__(self, model: Model, seed: int) -> None:
        tokenizer, device = model.tokenizer, model.device
        self.generator = torch.Generator(device).manual_seed(seed)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = torch.tensor(sorted(special | set(tokenizer.all_special_ids)), device=device)
        ordinary = torch.ones(len(tokenizer), dtype=torch.bool, device=device)
        ordinary[self.special] = False
        self.ordinary = ordinary.nonzero().flatten()
        framed, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        before = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        self.prefix: list[int] = framed[:before]
        self.suffix: list[int] = framed[before + len(plain) :]

    def any(self, count: int) -> Tensor:
        """Ordinary tokens ``[count]``, all equally likely."""
        return self.ordinary[
            torch.randint(len(self.ordinary), (count,), generator=self.generator, device=self.ordinary.device)
        ]

    def draw(self, logits: Tensor, *, may_end: bool = False) -> Tensor:
        """One token for each row of logits ``[rows, vocabulary]``; a special one only where the text may end."""
        probabilities = logits.float().softmax(-1)
        probabilities[:, len(self.ordinary) + len(self.special) :] = 0.0  # padding of the embedding matrix
        if not may_end:
            probabilities[:, self.special] = 0.0
        return torch.multinomial(probabilities, 1, generator=self.generator).flatten()

    def ends(self, tokens: Tensor) -> Tensor:
        """Which tokens ``[rows]`` are special."""
        return torch.isin(tokens, self.special)


def _continue(model: Model, sampler: _Sampler, rows: int, length: int) -> Tensor:
    """Ancestral sampling from a decoder with its key-value cache."""
    device = model.device
    first = torch.tensor([sampler.prefix] * rows, device=device) if sampler.prefix else sampler.any(rows)[:, None]
    ids, new, past = first, first, None
    for _ in shown(range(length - first.shape[1]), "sampling"):
        output = model.network(input_ids=new, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, new = output.past_key_values, sampler.draw(output.logits[:, -1])[:, None]
        ids = torch.cat([ids, new], dim=1)
    return ids[:, :length]


def _fill_blanks(model: Model, sampler: _Sampler, rows: int, length: int) -> Tensor:
    """Grow texts by letting an encoder-decoder fill the blank at their end, again and again."""
    device, tokenizer, config = model.device, model.tokenizer, model.network.config
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    has_sentinel = sentinel is not None and sentinel != tokenizer.unk_token_id
    blank = sentinel if has_sentinel else tokenizer.mask_token_id
    said_first = [config.decoder_start_token_id, *([sentinel] if has_sentinel else [])]
    texts = sampler.any(rows)[:, None].tolist()
    while min(map(len, texts)) < length:
        inputs = [
            [*sampler.prefix, *text[-_CONTEXT:], *([] if blank is None else [blank]), *sampler.suffix] for text in texts
        ]
        ids, mask = _padded(inputs, tokenizer.pad_token_id or 0, device)
        states = model.network.get_encoder()(input_ids=ids, attention_mask=mask)
        said = new = torch.tensor([said_first] * rows, device=device)
        past, ended = None, torch.zeros(rows, dtype=torch.bool, device=device)
        for step in range(_SPAN):
            output = model.network(
                encoder_outputs=states, attention_mask=mask, decoder_input_ids=new, past_key_values=past, use_cache=True
            )
            past, new = output.past_key_values, sampler.draw(output.logits[:, -1], may_end=step > 0)[:, None]
            ended |= sampler.ends(new[:, 0])
            if bool(ended.all()):
                break
            said = torch.cat([said, torch.where(ended[:, None], -1, new)], dim=1)
            new = torch.where(ended[:, None], tokenizer.pad_token_id or 0, new)
        for text, filling in zip(texts, said[:, len(said_first) :].tolist(), strict=True):
            text.extend(token for token in filling if token >= 0)
    return torch.tensor([text[:length] for text in texts])


def _unmask(model: Model, sampler: _Sampler, rows: int, length: int) -> Tensor:
    """Fill masks in random order, an equal share of the positions in each round."""
    device = model.device
    inside = length - len(sampler.prefix) - len(sampler.suffix)
    if inside < 1:
        raise BadInput(f"corpus.length={length} leaves no room between {model.name}'s special tokens")
    masks = [model.tokenizer.mask_token_id] * inside
    ids = torch.tensor([[*sampler.prefix, *masks, *sampler.suffix]] * rows, device=device)
    noise = torch.rand(rows, inside, generator=sampler.generator, device=device)
    order = noise.argsort(dim=1) + len(sampler.prefix)
    for positions in shown(order.tensor_split(min(_ROUNDS, inside), dim=1), "sampling"):
        for row in range(rows):  # one at a time: logits of a whole batch over the vocabulary would take gigabytes
            logits = model.network(input_ids=ids[row : row + 1]).logits[0, positions[row]]
            ids[row, positions[row]] = sampler.draw(logits)
    return ids


def _padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _weights_digest(model: Model) -> str:
    """Digest of every parameter and of what the tokenizer adds around a text."""
    sha = hashlib.sha256(str(model.tokenizer.special_tokens_map).encode())
    for name, parameter in model.network.named_parameters():
        sha.update(name.encode())
        sha.update(parameter.detach().contiguous().cpu().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return sha.hexdigest()
