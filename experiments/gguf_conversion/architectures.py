"""The architectures of GGUF beside the model types of transformers: which are written, and why the others are not.

    python experiments/gguf_conversion/architectures.py [--llama-cpp DIR] [--page docs/saving.md]

prints one line for each type of causal, sequence-to-sequence and masked language models that the installed gguf names
an architecture for, then the number of the others. With a checkout of llama.cpp, types that its conversion knows under
an architecture of the installed gguf and that this program knows nothing of make the status 1. `--page` puts the list
into a page, between two marks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap

from gguf import MODEL_ARCH_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from knowledge_compression.models.checkpoints.gguf.families import ARCHITECTURES
from knowledge_compression.models.checkpoints.gguf.unwritten import UNWRITTEN

KINDS = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
BEGIN = "<!-- architectures: made by experiments/gguf_conversion/architectures.py -->"
END = "<!-- architectures: end -->"
SAME = {"gpt-sw3": "gpt2"}  # names of tokenizers for networks of another type
CONVERTED = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import gguf
from conversion import get_model_class
found = {}
for name in sys.argv[2:]:
    try:
        found[name] = gguf.MODEL_ARCH_NAMES[get_model_class(name).model_arch]
    except (NotImplementedError, KeyError):  # unknown, or known with images or sound only
        pass
print(json.dumps(found))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print; the status is 1 if a type is neither written nor has a reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, help="a checkout of llama.cpp")
    parser.add_argument("--page", type=Path, help="a page to put the list into")
    chosen = parser.parse_args(arguments)
    kinds = {kind: role for role, named in KINDS.items() for kind in named if kind not in SAME}
    rows = [(kind, role, *said(kind)) for kind, role in sorted(kinds.items()) if said(kind)[0]]
    for kind, role, architecture, answer in rows:
        print(f"{kind:24s} {role:8s} {architecture:16s} {answer}")
    versions = f"gguf {version('gguf')}, transformers {version('transformers')}"
    print(f"{len(kinds) - len(rows)} types without an architecture ({versions})")
    if chosen.page:
        before, _, rest = chosen.page.read_text().partition(BEGIN)
        chosen.page.write_text("\n".join([before + BEGIN, *table(rows, versions), END + rest.partition(END)[2]]))
    unknown = list(converted(chosen.llama_cpp)) if chosen.llama_cpp else []
    for kind, architecture in unknown:
        print(f"{kind} is converted by llama.cpp to {architecture}, but is neither written nor has a reason")
    return int(bool(unknown))


def said(kind: str) -> tuple[str, str]:
    """GGUF's names of a model type's architectures, and whether it is written; empty names if there are none."""
    kind = SAME.get(kind, kind)
    if (known := ARCHITECTURES.get(kind)) is not None:
        return ", ".join(dict.fromkeys([known.name, *(other.name for _, other in known.others)])), "written"
    if (found := UNWRITTEN.get(kind)) is not None:
        return found.architecture, found.reason
    return "", ""


def table(rows: Sequence[tuple[str, str, str, str]], versions: str) -> Iterator[str]:
    """The list as a page has it: written types in one paragraph, the others as a table."""
    written = [f"`{kind}`" for kind, _, _, answer in rows if answer == "written"]
    yield ""
    yield from wrap(f"{len(written)} types are written ({versions}): {', '.join(written)}.", 130)
    yield from ("", "| not written | GGUF's architecture | why |", "|---|---|---|")
    for kind, _, architecture, answer in rows:
        if answer != "written":
            yield f"| `{kind}` | `{architecture}` | {answer} |"
    yield ""


def converted(llama_cpp: Path) -> Iterator[tuple[str, str]]:
    """Types that llama.cpp's conversion knows, by an architecture of the installed gguf, and this program does not."""
    classes = {one: kind for named in KINDS.values() for kind, of in named.items() for one in parts(of)}
    command = [sys.executable, "-c", CONVERTED, str(llama_cpp), *classes]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    names = set(MODEL_ARCH_NAMES.values())
    yield from ((classes[one], of) for one, of in found.items() if of in names and not said(classes[one])[0])


def parts(named: str | Sequence[str]) -> Sequence[str]:
    """One name of a class, or several."""
    return (named,) if isinstance(named, str) else named


if __name__ == "__main__":
    sys.exit(main())
