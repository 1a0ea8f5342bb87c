"""Building a model from a place with transformers: its network, its configuration, its tokenizer.

A place is a folder, a hub id or a file. Compressed formats are decoded (``checkpoints/``).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.memory import reuse_freed_memory
from knowledge_compression.models.content import check_shards
from knowledge_compression.models.device import DTYPES, resolve_device, resolve_dtype, torch_dtype
from knowledge_compression.models.failures import one_line_failures, quiet
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER, family_of
from knowledge_compression.models.hub import is_cached
from knowledge_compression.models.model import Model
from knowledge_compression.models.soundness import (
    check_configuration,
    check_it_runs,
    check_loaded,
    check_shapes,
    check_tokenizer,
)
from knowledge_compression.models.spread import Spread, is_spread, keep_scratch
from knowledge_compression.models.streamed import Checkpoint, StreamedModel, check_kinds, has_weights
from knowledge_compression.progress import underway

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from knowledge_compression.models.checkpoints.stored import Stored


def check_memory(skeleton: Model, device: str | Spread, dtype: str) -> None:
    """Refuse a model whose weights do not fit on the device.

    Raises:
        BadInput: they are larger than the free memory.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    own: Any = skeleton.network.config.dtype
    stored = kind if isinstance(kind, torch.dtype) else own or torch.float32
    needed = skeleton.parameter_count() * stored.itemsize
    free = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise BadInput(
            f"{skeleton.name} takes {needed / 1e9:.1f} GB in {str(stored).removeprefix('torch.')} and {place} has "
            f"{free / 1e9:.1f} GB free, so it can be streamed but not evaluated; choose eval=[] "
            "recovery=none to write the compressed checkpoint only, or a narrower dtype"
        )


def from_pretrained(
    where: str,
    name: str,
    device: str | Spread,
    dtype: str,
    *,
    stored: Stored | None = None,
    allow_pickle: bool = False,
    **hub: Any,
) -> Model:
    """Load configuration, network and tokenizer.

    Args:
        where: a folder, a hub id or a file.
        name: the name shown to users.
        device, dtype: as the user chose them.
        stored: the compressed checkpoint that is there, if it is one.
        allow_pickle: whether a pickle may be read.
        **hub: further arguments for transformers, such as the revision.

    Raises:
        ModelUnavailable: it cannot be read.
        BadInput: it cannot be used.
    """
    from transformers import AutoTokenizer

    from knowledge_compression.models.checkpoints.folder import check_declared

    place = resolve_device(device)
    spread = device.loading(place) if isinstance(device, Spread) else {}
    if place.type == "cpu":
        reuse_freed_memory()
    if Path(where).is_dir():
        check_shards(Path(where))
        if has_weights(Path(where)):
            Checkpoint(Path(where)).described()  # names the file that is damaged
    # A download shows the hub's own bars, which would interfere with this program's.
    waiting = underway(f"loading {name}") if Path(where).exists() or is_cached(where, **hub) else nullcontext()
    with one_line_failures(where, name, allow_pickle), quiet(), waiting:
        config = _configuration(where, stored, **hub)
        if stored is not None:
            if spread:
                form = stored.record().format
                raise BadInput(f"it is compressed already ({form}) and is decoded as a whole; choose device_map=null")
            network, loaded = stored.network(auto_class(config), config, resolve_dtype(dtype, place))
        else:
            network, loaded = auto_class(config).from_pretrained(
                where,
                config=config,
                dtype=resolve_dtype(dtype, place),
                use_safetensors=None if allow_pickle else True,
                ignore_mismatched_sizes=True,  # which are in the report
                output_loading_info=True,
                **spread,
                **hub,
            )
        check_shapes(loaded["mismatched_keys"])
        check_declared(network.config, loaded["unexpected_keys"])
        check_loaded(network, loaded["missing_keys"], loaded["unexpected_keys"])
        if stored is None:
            check_kinds(network, Path(where))
        tokenizer = stored.tokenizer(**hub) if stored is not None else AutoTokenizer.from_pretrained(where, **hub)
        if spread:
            keep_scratch(network, spread["offload_folder"])
        placed = network if is_spread(network) else network.to(place)
        model = Model(placed.eval(), tokenizer, name, on_disk=stored.record() if stored else None)
        if not model.head_is_tied:  # T5's configuration says that the head is tied even if the checkpoint has one
            model.keep_head_untied()
        check_tokenizer(model)
        check_it_runs(model)
    return model


def tokenizer_of(where: str, name: str, stored: Stored | None = None, **hub: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone; arguments as for :func:`from_pretrained`."""
    from transformers import AutoTokenizer

    with one_line_failures(where, name, allow_pickle=False):
        return stored.tokenizer(**hub) if stored is not None else AutoTokenizer.from_pretrained(where, **hub)


def skeleton_of(where: str, name: str, stored: Stored | None = None, **hub: Any) -> Model:
    """The network on the meta device, without weights; arguments as for :func:`from_pretrained`."""
    from transformers import PretrainedConfig

    with one_line_failures(where, name, allow_pickle=False):
        config = _configuration(where, stored, **hub)
        with torch.device("meta"):
            network = auto_class(config).from_config(config)
        described = stored is None or (Path(where) / "config.json").is_file()  # a GGUF file has none
        told = PretrainedConfig.get_config_dict(where, **hub)[0] if described else {}
    model = Model(network, None, name)  # type: ignore[arg-type]  # a skeleton reads no text
    if told.get("tie_word_embeddings") is False and model.head_is_tied:  # transformers forgets that of T5 and mT5
        model.untie_head()
    return model


def streamed_from(folder: Path, name: str, device: str | Spread, dtype: str, **hub: Any) -> StreamedModel:
    """A network whose parameters are on the meta device; buffers that are in no checkpoint are computed."""
    from accelerate import init_empty_weights
    from transformers import AutoTokenizer

    place = resolve_device(device)
    with one_line_failures(str(folder), name, allow_pickle=False):
        config = _configuration(str(folder), **hub)
        resolve_dtype(dtype, place)
        chosen = torch_dtype(dtype) if dtype in DTYPES else config.dtype or torch.float32
        with init_empty_weights(include_buffers=False):
            network = auto_class(config).from_config(config, dtype=chosen)
        network.tie_weights()  # replacing the parameters has separated those that are tied
        tokenizer = AutoTokenizer.from_pretrained(folder, **hub)
        checkpoint = Checkpoint(folder)
        model = StreamedModel(network.eval(), tokenizer, name, checkpoint=checkpoint, place=place, stored=chosen)
        check_tokenizer(model)
    return model


def _configuration(where: str, stored: Stored | None = None, **hub: Any) -> Any:
    from transformers import AutoConfig

    config = stored.configuration(**hub) if stored is not None else AutoConfig.from_pretrained(where, **hub)
    check_configuration(config)
    return config


def auto_class(config: Any) -> Any:
    """The class of transformers that builds a language model from this configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    classes = {ENCODER: AutoModelForMaskedLM, ENCODER_DECODER: AutoModelForSeq2SeqLM, DECODER: AutoModelForCausalLM}
    return classes[family_of(config)]
