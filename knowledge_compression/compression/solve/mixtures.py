"""llama.cpp's mixtures of types, such as Q4_K_M: which type each tensor gets, by its role and depth.

The rules are those of ``llama-quantize`` without an importance matrix (llama.cpp, ``llama_tensor_get_type``, as in
llama-cpp-python 0.3.36). Files that it calls Q2_K are a mixture too, here ``q2_k_mixed``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The type of every tensor to which no rule gives another.
MIXTURES: Mapping[str, str] = {
    "q2_k_mixed": "q2_k",
    **{f"q3_k_{size}": "q3_k" for size in "sml"},
    **{f"q{bits}_k_{size}": f"q{bits}_k" for bits in (4, 5) for size in "sm"},
}
# The roles of tensors, by parts of their names.
_PARTS = ("attn_qkv", "attn_v", "attn_k", "attn_q", "attn_output", "ffn_down")


@dataclass(frozen=True)
class Mixed:
    """The facts about a model that the rules use.

    Attributes:
        blocks: number of blocks.
        queries: query heads per key head.
        experts: number of experts in a block; 0 if it has none.
        falcon: whether it is a Falcon.
        seventy: whether it is a 70B model, with 80 blocks.
    """

    blocks: int
    queries: int = 1
    experts: int = 0
    falcon: bool = False
    seventy: bool = False

    def type_of(self, mixture: str, tensor: str, block: int) -> str:
        """The type of a tensor inside a block.

        Args:
            mixture: one of :data:`MIXTURES`.
            tensor: its name in GGUF files.
            block: the index of its block.
        """
        plain = MIXTURES[mixture]
        part = next((name for name in _PARTS if name in tensor), "")
        if part in ("attn_v", "attn_qkv"):
            return self._values(mixture, block, plain)
        if part == "attn_k":
            return "q8_0" if self.experts == 8 else plain
        if part == "ffn_down":
            return self._down(mixture, block, plain)
        if part == "attn_output":
            return self._output(mixture, plain)
        return plain

    def head(self, width: int) -> str:
        """The type of the final layer, and of embeddings that serve as one, for rows of this width."""
        return "q8_0" if self.falcon or width % 256 else "q6_k"

    def _more(self, block: int) -> bool:
        """Whether a block gets more bits: the first and last eighth of the blocks, and every third block between."""
        first = self.blocks // 8
        return block < first or block >= 7 * self.blocks // 8 or (block - first) % 3 == 2

    def _values(self, mixture: str, block: int, plain: str) -> str:
        kind = plain
        if mixture == "q2_k_mixed":
            kind = "q4_k" if self.queries >= 4 else "q3_k"
        elif mixture == "q3_k_m":
            kind = "q5_k" if block < 2 else "q4_k"
        elif mixture == "q3_k_l" or (mixture == "q4_k_s" and block < 4):
            kind = "q5_k"
        elif mixture in ("q4_k_m", "q5_k_m") and self._more(block):
            kind = "q6_k"
        if self.seventy and kind in ("q3_k", "q4_k"):
            kind = "q5_k"
        return "q8_0" if self.experts == 8 else kind

    def _down(self, mixture: str, block: int, plain: str) -> str:
        more, early = self._more(block), block < self.blocks // 16
        rules = {
            "q2_k_mixed": "q3_k",
            "q3_k_m": "q5_k" if early else "q4_k",
            "q3_k_l": "q5_k",
            "q4_k_s": "q5_k" if block < self.blocks // 8 else plain,
            "q4_k_m": "q6_k" if more else plain,
            "q5_k_m": "q6_k" if more else plain,
        }
        if self.falcon:
            rules |= {
                "q3_k_m": "q5_k" if early else "q4_k" if more else "q3_k",
                "q3_k_l": "q4_k",
                "q4_k_s": plain,
                "q4_k_m": "q6_k" if early else "q5_k" if more else "q4_k",
            }
        return rules.get(mixture, plain)

    def _output(self, mixture: str, plain: str) -> str:
        if self.falcon:
            return "q4_k" if mixture == "q3_k_l" else plain
        if self.experts == 8:
            return "q5_k" if mixture in ("q2_k_mixed", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m") else plain
        return {"q2_k_mixed": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mixture, plain)
