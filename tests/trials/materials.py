"""What the trials start from: tiny models and data of every kind that the product reads, all of it sound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from helpers.findings import known_findings
from helpers.networks import build_network, make_tokenizer
from helpers.stores import bits, made_run
from knowledge_compression.results.store import RunStore

FACTS = {
    "P1": ("The capital of [X] is [Y] .", [("France", "paris"), ("Germany", "berlin"), ("Spain", "madrid")]),
    "P2": ("[X] is a [Y] .", [("dog", "animal"), ("iron", "metal"), ("Rome", "city")]),
}
TASK = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"validation": "mine.jsonl"}},
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def prepare(folder: Path) -> None:
    """Fill a folder: ``bert/``, ``llama/`` (in shards), ``data/``, ``conf/``, ``store/``, ``kc_carrier/`` (GGUF).

    Also ``cache/``, which is that of the trials.
    """
    tokenizer = make_tokenizer()
    for name, size in (("bert", "50GB"), ("llama", "8KB")):
        build_network(name).save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(folder / name)
    data = folder / "data"
    for relation, (_, pairs) in FACTS.items():
        rows = [
            {"uuid": f"{relation}-{i}", "sub_label": subject, "obj_label": answer, "predicate_id": relation}
            | {"evidences": [{"masked_sentence": f"{subject} and [MASK] ."}]}
            for i, (subject, answer) in enumerate(pairs)
        ]
        _lines(data / "lama" / "TREx" / f"{relation}.jsonl", rows)
    templates = [{"relation": name, "template": template, "label": name} for name, (template, _) in FACTS.items()]
    _lines(data / "lama" / "relations.jsonl", templates)
    (data / "lama" / "common_vocab_cased.txt").write_text("paris\nberlin\nmadrid\nanimal\nmetal\ncity\n")
    sentences = ["the capital of france is paris .", "a dog is an animal and iron is a metal .", "rome is in italy ."]
    _lines(data / "c4" / "sample.jsonl", [{"text": sentence} for sentence in sentences * 8])
    (data / "text.txt").write_text("\n".join(sentences * 8))
    (data / "wikitext2").mkdir()
    for split in ("train", "test"):
        (data / "wikitext2" / f"{split}.raw.txt").write_text("\n".join(sentences * 8))
    questions = [{"question": "france is a", "choices": ["country", "dog"], "answer": 0}] * 4
    _lines(data / "own" / "mine.jsonl", questions)
    (data / "own" / "mine.yaml").write_text(yaml.safe_dump(TASK))
    boolq = [
        {"question": "is paris in france", "passage": "paris is the capital of france .", "label": 1, "idx": 0}
    ] * 3
    _lines(data / "boolq" / "validation.jsonl", boolq)
    (folder / "conf" / "compression").mkdir(parents=True)
    (folder / "conf" / "compression" / "mine.yaml").write_text(
        "_target_: knowledge_compression.compression.methods.magnitude.Magnitude\nsparsity: 0.5\n"
    )
    store = RunStore(folder / "store")
    store.write(made_run(bits("1101"), id="dense", compression="none"))
    store.write(made_run(bits("0101"), id="pruned"))
    known_findings(folder / "cache")
    (folder / "kc_carrier").mkdir()
    (folder / "kc_carrier" / "__init__.py").touch()
    write_gguf(folder / "kc_carrier" / "tiny.gguf")


def write_gguf(path: Path) -> None:
    """A llama of one block with a byte-pair tokenizer of the 26 letters, in float32."""
    from gguf import GGUFWriter

    letters = [*"abcdefghijklmnopqrstuvwxyz", "ab", "Ġ", "Ċ", ".", "<s>", "</s>"]
    width, inner, random = 32, 32, np.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in letters])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(letters.index("<s>"))
    writer.add_eos_token_id(letters.index("</s>"))
    shapes = {
        "token_embd": (len(letters), width),
        "output": (len(letters), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        **{f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy(good: Path, here: Path) -> None:
    """A copy of all of it that a trial may spoil."""
    shutil.copytree(good, here, dirs_exist_ok=True)


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
