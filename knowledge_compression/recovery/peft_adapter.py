"""An adapter folder of the peft library for the model that it was trained on: LoRA, a soft prompt, or a prefix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.identity import PLACE
from knowledge_compression.models import Model
from knowledge_compression.models.content import files_fingerprint
from knowledge_compression.models.families import DECODER
from knowledge_compression.models.prompts import NO_PROMPTS, Prompts
from knowledge_compression.models.targets import linear_layers
from knowledge_compression.recovery.bank import bank_of, check_decoder, check_positions, embedding_width, key_shape
from knowledge_compression.recovery.base import Recovered, Recovery, RecoveryReport, RestoresBy
from knowledge_compression.recovery.joined import join_prompt
from knowledge_compression.recovery.prefix import prefix_bank
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.training import LogCallback

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LORA, PROMPT, PREFIX = "LORA", "PROMPT_TUNING", "PREFIX_TUNING"
_TRAINED = "prompt_embeddings"  # peft's name for a prompt, or for the keys and values of a prefix


@dataclass(frozen=True)
class PeftAdapter(Recovery):
    """Add a trained adapter to the compressed model; nothing is trained here.

    Attributes:
        path: a folder that peft's ``save_pretrained`` wrote.
        merge: whether a LoRA is added into the weights. This costs nothing when the model runs, but rounds the weights
        once. Otherwise the LoRA stays separate.
    """

    path: str = field(metadata=PLACE)
    merge: bool = False
    name = "adapter"
    restores_by = RestoresBy.WEIGHTS  # a prompt or prefix says in its report that it redirects

    def fingerprint(self) -> str:
        """Digest of its settings and weights."""
        self._settings()
        return files_fingerprint([self._folder / SETTINGS, self._folder / WEIGHTS])

    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> Recovered:
        """Add the adapter.

        Raises:
            BadInput: the folder holds no adapter that can be read, or one for another model.
        """
        settings, tensors = self._settings(), self._tensors()
        kind = settings["peft_type"]
        if self.merge and (kind != LORA or any(layer.is_replaced for layer in linear_layers(model))):
            raise BadInput(
                f"recovery.merge=true adds a LoRA into floating-point weights; this is {kind} on "
                f"{model.name}, so choose recovery.merge=false"
            )
        model.network.requires_grad_(False)
        if kind == LORA:
            self._add_lora(model, settings, tensors)
            if self.merge:
                self._merge_lora(model)
            prompts = NO_PROMPTS
        else:
            prompts = self._place(model, kind, tensors)
        details = {"kind": kind.lower(), "trained_on": settings.get("base_model_name_or_path")}
        details |= {name: settings[name] for name in ("r", "lora_alpha", "num_virtual_tokens") if name in settings}
        parameters = sum(tensor.numel() for tensor in tensors.values())
        way = RestoresBy.WEIGHTS if kind == LORA else RestoresBy.REDIRECTION
        return Recovered(RecoveryReport(self.name, parameters, details=details), prompts, way)

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    def _settings(self) -> Mapping[str, Any]:
        """Its ``adapter_config.json``.

        Raises:
            BadInput: there is none, or this kind of adapter cannot be read.
        """
        try:
            settings = json.loads((self._folder / SETTINGS).read_bytes())
            kind = settings["peft_type"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(
                f"recovery.path={self.path} holds no {SETTINGS} that can be read ({first_line(error)}); give a folder "
                "that peft's save_pretrained wrote"
            ) from None
        if kind not in (LORA, PROMPT, PREFIX):
            raise BadInput(
                f"recovery.path={self.path} is an adapter of the kind {kind}; {LORA}, {PROMPT} and {PREFIX} can be read"
            )
        if settings.get("modules_to_save"):
            raise BadInput(
                f"recovery.path={self.path} replaces whole layers ({settings['modules_to_save']}) "
                "in addition, which is not read; merge it into the model with peft's merge_and_unload"
            )
        if not (self._folder / WEIGHTS).is_file():
            there = "a pickle, which can run code, and no" if (self._folder / PICKLE).is_file() else "no"
            raise BadInput(f"recovery.path={self.path} holds {there} {WEIGHTS}")
        return dict(settings)

    def _tensors(self) -> dict[str, Tensor]:
        try:
            with safe_open(self._folder / WEIGHTS, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{self._folder / WEIGHTS} cannot be read ({first_line(error)})") from None

    def _add_lora(self, model: Model, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Insert the low-rank additions at the layers that the adapter names."""
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
        from peft.tuners.lora import Linear as LoraLinear

        known = {name: value for name, value in settings.items() if name in LoraConfig.__dataclass_fields__}
        try:
            config = LoraConfig(**(known | {"inference_mode": True}))
            ours = {type(layer.module) for layer in linear_layers(model) if layer.is_replaced}
            config._register_custom_module(dict.fromkeys(ours, LoraLinear))
            inject_adapter_in_model(config, model.network)
            self._check_shapes(model, tensors)
            result: Any = set_peft_model_state_dict(model.network, dict(tensors))
        except BadInput:
            raise
        except Exception as error:  # peft may raise anything for settings that it does not expect
            raise self._of_another(model, first_line(error)) from None
        if result.unexpected_keys:
            raise self._of_another(model, f"it has no {result.unexpected_keys[0]}")
        if missing := [name for name in result.missing_keys if "lora_" in name]:
            raise self._of_another(model, f"nothing in it is for {missing[0]}")
        model.network.requires_grad_(False)
        model.network.eval()

    def _check_shapes(self, model: Model, tensors: Mapping[str, Tensor]) -> None:
        """Refuse matrices whose widths differ from those of their layers; torch's own message has many lines."""
        there = model.network.state_dict()
        for name, tensor in tensors.items():
            place = there.get(name.removeprefix("base_model.model.").removesuffix(".weight") + ".default.weight")
            if place is not None and place.shape != tensor.shape:
                raise self._of_another(
                    model, f"{name} has the shape {list(tensor.shape)}, and the model takes {list(place.shape)}"
                )

    def _merge_lora(self, model: Model) -> None:
        """Add the low-rank additions into the weights, and remove them from the layers."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        found = {path: part for path, part in model.network.named_modules() if isinstance(part, BaseTunerLayer)}
        for path, part in found.items():
            part.merge(safe_merge=True)
            model.network.set_submodule(path, part.get_base_layer())

    def _place(self, model: Model, kind: str, tensors: Mapping[str, Tensor]) -> Prompts:
        """Put the prompt or prefix before the model's input."""
        trained = tensors.get(_TRAINED)
        if trained is None or trained.dim() != 2:
            raise BadInput(f"{self._folder / WEIGHTS} holds no {_TRAINED}, which an adapter of the kind {kind} needs")
        check_positions(model, len(trained))
        if kind == PREFIX:
            check_decoder(model)
            heads, width = key_shape(model)
            layers = model.network.config.get_text_config().num_hidden_layers
            if trained.shape[1] != (wanted := 2 * layers * heads * width):
                raise self._of_another(
                    model, f"a prefix for it has {wanted} numbers per token, this one has {trained.shape[1]}"
                )
            return Prompted(model, prefix_bank(model, trained)).prompts
        if trained.shape[1] != (width := embedding_width(model)):
            raise self._of_another(
                model, f"its embeddings have {width} numbers, those of the prompt have {trained.shape[1]}"
            )
        if model.family == DECODER:
            return Prompted(model, bank_of(model, [trained.to(model.device, model.dtype)])).prompts
        join_prompt(model, trained.to(model.dtype))
        model.network.requires_grad_(False)
        return Prompts(len(trained))

    def _of_another(self, model: Model, why: str) -> BadInput:
        return BadInput(f"recovery.path={self.path} was trained for another model than {model.name}: {why}")
