"""auto-round's own checkpoints: tensors as in GPTQ or AWQ; ``packing_format`` says which.

``auto_round:auto_gptq`` stores zero points minus one, as version 1 of GPTQ; ``auto_round`` and ``auto_round:gptqmodel``
store them as they are; ``auto_round:auto_awq`` is AWQ's gemm. There is no ``g_idx``, and layers may differ in bits and
in the size of their groups, which need not divide their inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.awq import Awq
from knowledge_compression.models.checkpoints.gptq import Gptq, sizes_in


@dataclass(frozen=True)
class AutoRoundGptq(Gptq):
    """GPTQ's tensors, written by auto-round."""

    left_out = "extra_config"


@dataclass(frozen=True)
class AutoRoundAwq(Awq):
    """AWQ's tensors, written by auto-round."""

    left_out = "extra_config"


class AutoRound:
    """The choice between the two.

    Attributes:
        methods: the values of ``quantization_config.quant_method`` by which such checkpoints are recognised.
        zero_offsets: packings with GPTQ's tensors, and what was subtracted from their zero points.
    """

    methods: ClassVar[tuple[str, ...]] = ("auto-round",)
    zero_offsets: ClassVar[Mapping[str, int]] = {"auto_round:auto_gptq": 1, "auto_round": 0, "auto_round:gptqmodel": 0}
    awq: ClassVar[str] = "auto_round:auto_awq"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> AutoRoundGptq | AutoRoundAwq:
        """The format with a checkpoint's ``quantization_config``.

        Raises:
            BadInput: it is packed in another way, its codes are no integers, or inputs are to be rotated or rounded.
        """
        packing = str(settings.get("packing_format"))
        if packing != cls.awq and packing not in cls.zero_offsets:
            raise BadInput(
                f"it is an auto-round checkpoint with packing_format={packing}; {', '.join(cls.zero_offsets)} and "
                f"{cls.awq} can be read"
            )
        kind, inputs = settings.get("data_type", "int"), settings.get("act_bits", 16)
        rotated = [name for name, value in settings.items() if value and ("rotation" in name or "transform" in name)]
        if kind != "int" or inputs != 16 or rotated:
            told = ", ".join([f"data_type={kind}", f"act_bits={inputs}", *rotated])
            raise BadInput(
                f"it is an auto-round checkpoint with {told}; those with data_type=int can be read, unless "
                f"inputs are to be rounded or rotated"
            )
        made_by = f"auto-round {settings.get('autoround_version', '')}".strip()
        if packing == cls.awq:
            Awq.of({"bits": settings.get("bits", 4)})
            return AutoRoundAwq(made_by)
        apart = settings.get("extra_config")
        sizes = sizes_in([settings, *(apart.values() if isinstance(apart, Mapping) else ())])
        return AutoRoundGptq(cls.zero_offsets[packing], made_by, sizes)
