"""GGUF files, split ones too, of every architecture and type that the installed transformers and gguf know.

The library gguf decodes the blocks; transformers' tables map the tensor names of an architecture, and undo the changes
of the conversion from transformers (the row order of LLaMA's queries and keys, norms stored as ``w + 1``). A chat
template in the file is ignored: it is a program written by the file's author.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, dequantize
from numpy.typing import NDArray
from torch import Tensor

from knowledge_compression.errors import BadInput, ModelUnavailable, first_line
from knowledge_compression.models.checkpoints.base import Coded, StoredAs
from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture, architecture_in, is_turned
from knowledge_compression.models.checkpoints.gguf.families import ARCHITECTURES
from knowledge_compression.models.checkpoints.gguf.header import MAGIC, GgufHeader, GgufTensor
from knowledge_compression.models.checkpoints.gguf.rope import FREQUENCIES, check_lengths, with_rope
from knowledge_compression.models.checkpoints.stored import Later, Stored

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logging.getLogger("gguf").setLevel(logging.WARNING)  # gguf reports every file that it writes

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PLAIN = {kind for kind, (block, _) in GGML_QUANT_SIZES.items() if block == 1} | {GGMLQuantizationType.BF16}
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}
Scales = Mapping[str, tuple[GgufTensor, Path]]
_TERNARY = {GGMLQuantizationType.TQ1_0: 1.625}  # five ternary digits per byte, and the rest


@dataclass(frozen=True)
class GgufFile(Stored):
    """A GGUF file.

    Attributes:
        files: its parts in order; a single one if it is not split.
    """

    files: Sequence[Path]

    @classmethod
    def at(cls, path: Path) -> GgufFile | None:
        """The file, if it begins like a GGUF file; any part of a split one identifies all parts.

        Raises:
            ModelUnavailable: it is one of several parts, and another is missing.
        """
        try:
            with path.open("rb") as file:
                if file.read(4) != MAGIC:
                    return None
        except OSError as error:
            raise ModelUnavailable(f"{path} cannot be read ({error.strerror})") from None
        if not (split := _SPLIT.fullmatch(path.name)):
            return cls((path,))
        count = int(split["count"])
        parts = [path.with_name(f"{split['stem']}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
        if missing := [part.name for part in parts if not part.is_file()]:
            raise ModelUnavailable(f"{path.parent} lacks {missing[0]}, one of the {count} parts of this GGUF file")
        return cls(tuple(parts))

    @property
    def architecture(self) -> str:
        """The file's name for its architecture."""
        return str(self._headers[0].settings.get("general.architecture"))

    @cached_property
    def described(self) -> list[tuple[GgufTensor, Path]]:
        """Every tensor, and the part that holds it.

        Raises:
            BadInput: a part is damaged, or not one of this file.
        """
        told = self._headers[0].settings.get("split.tensors.count")
        found = [(tensor, header.path) for header in self._headers for tensor in header.tensors]
        if len({tensor.name for tensor, _ in found}) < len(found) or told not in (None, len(found)):
            raise BadInput(
                f"its {len(self.files)} parts hold only {len(found)} tensors; they are not parts of one model"
            )
        return found

    def configuration(self, **hub: Any) -> PretrainedConfig:
        """The configuration that transformers derives from the file's settings."""
        from transformers import AutoConfig

        return AutoConfig.for_model(**self._settings)

    def tokenizer(self, **hub: Any) -> PreTrainedTokenizerBase:
        """The tokenizer that transformers derives from the file's vocabulary, without a chat template."""
        from transformers import PreTrainedTokenizerFast
        from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

        # AutoTokenizer chooses the same by the file's settings, for which it reads the whole vocabulary once more.
        named = TOKENIZER_MAPPING_NAMES.get(self._settings["model_type"])
        kind = (tokenizer_class_from_name(named) if named else None) or PreTrainedTokenizerFast
        made: PreTrainedTokenizerBase = kind.from_pretrained(self.files[0].parent, gguf_file=self.files[0].name)
        made.chat_template = None
        return made

    def weights(self, skeleton: PreTrainedModel) -> dict[str, Later]:
        """Each weight of the network, from the tensor or tensors that form it."""
        there = {tensor.name: (tensor, path) for tensor, path in self.described}
        if self._known is not None:
            _, known = self._known
            found = known.names(skeleton)
            scales = self._scales({one for of in found.values() for one in of})
            weights = {
                name: Later(partial(_decoded, name, [there[one] for one in of], scales, known=known, skeleton=skeleton))
                for name, of in found.items()
                if all(one in there for one in of)
            }
            stored = self._headers[0].settings
            for name, shape in ((name, value.shape) for name, value in skeleton.state_dict().items()):
                if (told := known.number(name)) is not None and told[0] in stored:
                    weights[name] = Later(partial(_number, stored[told[0]], told[1], shape))
            return weights
        return self._weights_by_transformers(skeleton)

    def _weights_by_transformers(self, skeleton: PreTrainedModel) -> dict[str, Later]:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=self._settings)
        names: dict[str, str] = get_gguf_hf_weights_map(_Outline(skeleton), processor)
        sources: dict[str, list[tuple[GgufTensor, Path]]] = {}
        for tensor, path in self.described:
            # A bank of experts is a parameter of its own, which has no ending.
            if target := names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight")):
                sources.setdefault(target, []).append((tensor, path))
        scales = self._scales(names)
        return {
            target: Later(partial(_made, target, of, scales, processor=processor, names=names))
            for target, of in sources.items()
        }

    def _scales(self, parameters: Collection[str]) -> Scales:
        """The tensors that scale others, as those of NVFP4 have them, by the names of the scaled ones.

        Args:
            parameters: names of tensors that are parameters of the network, which may end like scales.
        """
        ends = ".scale"
        return {
            f"{tensor.name.removesuffix(ends)}.weight": (tensor, path)
            for tensor, path in self.described
            if tensor.name.endswith(ends) and tensor.name not in parameters
        }

    def record(self) -> StoredAs:
        """From the headers."""
        rest: Counter[str] = Counter()
        coded: list[tuple[Coded, int]] = []
        for tensor, _ in self.described:
            if tensor.kind in _PLAIN:
                rest[tensor.kind.name] += tensor.parameters
            elif "blk." in tensor.name:
                coded.append((_coded(tensor), tensor.bytes))
            else:  # embeddings and head, mostly stored in more bits than the layers
                rest[tensor.kind.name] += tensor.parameters
        settings = self._headers[0].settings
        told = (settings.get(f"general.{name}") for name in ("quantized_by", "author", "organization"))
        return StoredAs.of(
            f"gguf {_file_type(settings.get('general.file_type'))}".strip(),
            coded,
            rest,
            tensors=sum(tensor.bytes for tensor, _ in self.described),
            files=sum(path.stat().st_size for path in self.files),
            made_by=next((str(one) for one in told if one), ""),
        )

    @cached_property
    def _headers(self) -> list[GgufHeader]:
        return [GgufHeader.of(path) for path in self.files]

    @cached_property
    def _known(self) -> tuple[str, GgufArchitecture] | None:
        """The model type and description of its architecture, if it is one of those described here."""
        names = {tensor.name for tensor, _ in self.described}
        return architecture_in(self.architecture, names | set(self._headers[0].settings))

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """The configuration that follows from the file's settings and the names of its tensors.

        Raises:
            BadInput: its architecture cannot be read from GGUF files.
        """
        stored, names = self._headers[0].settings, {tensor.name for tensor, _ in self.described}
        settings = self._settings_by_transformers()
        if self._known is not None:
            kind, known = self._known
            own: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in names}
            own |= {f"{role}_token_id": stored.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
            if known.marks or not settings:
                settings = settings | {"model_type": kind}
            try:
                settings = own | settings | known.told(stored, names)
            except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
                raise BadInput(f"its settings do not describe a model ({first_line(error)})") from None
        words = stored.get("tokenizer.ggml.tokens")
        settings = ({"vocab_size": words} if isinstance(words, int) else {}) | settings
        check_lengths(names)
        found = [(tensor, path) for tensor, path in self.described if tensor.name == FREQUENCIES]
        divisors = next((dequantize(tensor.read(path), tensor.kind) for tensor, path in found), None)
        return with_rope(self.architecture, stored, settings, divisors)

    def _settings_by_transformers(self) -> dict[str, Any]:
        """The settings as transformers' tables read them; empty if only the descriptions here cover it."""
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, load_gguf_checkpoint

        with TemporaryDirectory() as folder:
            brief = Path(folder) / "brief.gguf"
            self._write_brief(brief)
            try:
                settings: dict[str, Any] = load_gguf_checkpoint(str(brief))["config"]
            except (ValueError, KeyError) as error:
                if "not supported" not in str(error):
                    raise BadInput(f"its settings do not describe a model ({first_line(error)})") from None
                if self._known is not None:
                    return {}
                known = {*GGUF_SUPPORTED_ARCHITECTURES, *(one.name for one in ARCHITECTURES.values())}
                readable = ", ".join(sorted(known - {"general", "tokenizer"}))
                raise BadInput(
                    f"it is a GGUF file of the architecture {self.architecture}; those that can be read are {readable}"
                ) from None
        return settings

    def _write_brief(self, path: Path) -> None:
        """Write one file with the settings of this one (all parts together), without vocabulary and weights.

        Transformers reads a file's settings with gguf's reader, which takes seconds for a vocabulary and trusts every
        length.
        """
        first = self._headers[0]
        writer = GGUFWriter(path, self.architecture)
        for key, value in first.settings.items():
            if key == "general.architecture" or key.startswith("tokenizer."):
                continue
            if ".rope.scaling." in key:  # read here; transformers takes the length of the key for gpt-oss's value
                continue
            if isinstance(value, list) and value:
                writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=first.kinds[key])
            elif isinstance(value, str) or not (isinstance(value, list) or first.kinds[key] == GGUFValueType.STRING):
                writer.add_key_value(key, value, first.kinds[key])
        for name in ("bos", "eos", "unknown", "padding"):
            key = f"tokenizer.ggml.{name}_token_id"
            if key in first.settings:
                writer.add_key_value(key, first.settings[key], first.kinds[key])
        for tensor, _ in self.described:
            writer.add_tensor(tensor.name, np.zeros(1, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


class _Outline:
    """A view of a network's weight names for transformers' search for the names in a GGUF file.

    Transformers visits every module inside every other and builds its table again for each; names without a prefix are
    found in the network itself or one module below.
    """

    def __init__(self, network: Any, depth: int = 1) -> None:
        self.config, self._network, self._depth = network.config, network, depth

    def state_dict(self) -> Any:
        return self._network.state_dict()

    def named_children(self) -> list[tuple[str, Any]]:
        inside = self._network.named_children() if self._depth else ()
        return [(name, _Outline(child, self._depth - 1)) for name, child in inside if hasattr(child, "config")]


def _floats(tensor: GgufTensor, path: Path, scales: Scales) -> NDArray[Any]:
    """The numbers of a tensor, scaled as a whole or each expert of a bank on its own.

    Raises:
        BadInput: it has another number of scales.
    """
    values: NDArray[Any] = dequantize(tensor.read(path), tensor.kind)
    if tensor.name not in scales:
        return values
    scale, place = scales[tensor.name]
    if scale.parameters not in (1, len(values)):
        raise BadInput(f"{scale.name} has {scale.parameters} numbers, and {tensor.name} {len(values)} rows or experts")
    return values * dequantize(scale.read(place), scale.kind).reshape(-1, *[1] * (values.ndim - 1))


def _decoded(
    name: str,
    of: Sequence[tuple[GgufTensor, Path]],
    scales: Scales,
    *,
    known: GgufArchitecture,
    skeleton: PreTrainedModel,
) -> Tensor:
    """The weight that several tensors form."""
    values = [(tensor.name, _floats(tensor, path, scales)) for tensor, path in of]
    whole = known.put_together(values, skeleton.config)
    if (place := known.place(name)) is not None:
        whole = whole[place]
    if is_turned(skeleton, name):
        whole = whole.swapaxes(-1, -2)
    return torch.from_numpy(np.require(whole, requirements=["C", "W", "O"]))


def _number(values: Sequence[float] | float, block: int, shape: Sequence[int]) -> Tensor:
    """A parameter of one number, of which a setting holds one for each block, or one for all."""
    return torch.tensor(values[block] if isinstance(values, Sequence) else values, dtype=torch.float32).reshape(
        tuple(shape)
    )


def _made(
    target: str, of: Sequence[tuple[GgufTensor, Path]], scales: Scales, *, processor: Any, names: dict[str, str]
) -> Tensor:
    """The weight that several tensors form, combined by transformers' processors of the architecture."""
    made: dict[str, Any] = {"tensors": {}}
    for tensor, path in of:
        values = _floats(tensor, path, scales)
        result = processor.process(weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=made)
        if result.name is not None:
            made["tensors"][target] = torch.from_numpy(np.require(result.weights, requirements=["C", "W", "O"]))
    whole: Tensor = made["tensors"][target]
    return whole


def _coded(tensor: GgufTensor) -> Coded:
    block, _ = GGML_QUANT_SIZES[tensor.kind]
    digit = re.search(r"\d", tensor.kind.name)
    bits = _TERNARY.get(tensor.kind) or float(digit[0] if digit else 8)
    return Coded(tensor.shape, bits, block, tensor.kind.name)


def _file_type(number: Any) -> str:
    """llama.cpp's name for the mixture of types, e.g. ``Q4_K_M``; empty if the file has none."""
    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return ""
