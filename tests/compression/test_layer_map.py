"""The heat map of a compression."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from helpers.layers import EVERYTHING, windows
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.results.layer_map import layer_map


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "t5", "albert"])
def test_a_map_is_a_png_that_differs_with_what_was_done(tiny_model, architecture: str) -> None:
    maps = []
    for method in (Gptq(bits=3), Rtn(bits=3)):
        model = tiny_model(architecture)
        maps.append(layer_map(method.compress(model, EVERYTHING.select(model), windows())))
    for png in maps:
        image = Image.open(io.BytesIO(png))
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24)) > 5
    assert maps[0] != maps[1]


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="no layer"):
        layer_map(CompressionReport("none"))
