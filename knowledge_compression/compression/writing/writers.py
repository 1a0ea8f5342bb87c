"""The formats in which ``output.save_model`` saves a compressed model, by name."""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_compression.building import nearest
from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.writing.awq import AwqWriter
from knowledge_compression.compression.writing.base import Floats, Writer
from knowledge_compression.compression.writing.bitsandbytes import BitsandbytesWriter
from knowledge_compression.compression.writing.compressed_tensors import CompressedTensorsWriter
from knowledge_compression.compression.writing.gguf import TYPES, GgufWriter
from knowledge_compression.compression.writing.gptq import GptqWriter
from knowledge_compression.compression.writing.layers import LayerWriter
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Targets

_OF_LAYERS: tuple[LayerWriter, ...] = (
    GptqWriter(),
    AwqWriter(),
    CompressedTensorsWriter(),
    BitsandbytesWriter(),
)
WRITERS: Mapping[bool | str, Writer] = {
    True: Floats(),
    **{writer.name: writer for writer in _OF_LAYERS},
    "gguf": GgufWriter(),
    **{f"gguf-{kind}": GgufWriter(kind) for kind in TYPES},
}


def writer_of(form: bool | str) -> Writer:
    """The writer of a format.

    Raises:
        BadInput: there is no such format.
    """
    if form not in WRITERS:
        there = ["false", *map(_shown, WRITERS)]
        raise BadInput(
            f"output.save_model={form} does not exist{nearest(str(form), there)}; choose one of {', '.join(there)}"
        )
    return WRITERS[form]


def check_form(form: bool | str, compression: Compression, targets: Targets) -> None:
    """Refuse a format that cannot hold these layers once compressed, and name the formats that can.

    Raises:
        BadInput: it cannot.
    """
    if why := writer_of(form).refusal(compression, targets):
        fitting = {name: writer for name, writer in WRITERS.items() if writer.refusal(compression, targets) is None}
        kinds = [type(writer) for writer in fitting.values()]
        others = [name for place, name in enumerate(fitting) if kinds.index(kinds[place]) == place]  # one of each kind
        raise BadInput(
            f"output.save_model={_shown(form)} cannot hold this: {why}; or choose output.save_model="
            f"{' or '.join(map(_shown, others))}"
        )


def _shown(form: bool | str) -> str:
    return str(form).lower()
