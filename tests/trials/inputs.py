"""The inputs: those that once ended badly, the settings of every part with values of wrong kinds, and spoilt files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from trials.damage import (
    SPOILS,
    adapter_folder,
    as_file,
    as_link,
    closed,
    emptied,
    flipped,
    further_weight,
    gone,
    infinite,
    integer_weight,
    lost_weight,
    name_shard,
    not_finite,
    set_key,
    spoilt,
    wrong_shape,
)
from trials.trying import ACCEPT, EITHER, REFUSE, Trial

CONF = Path(__file__).parents[2] / "conf"

# Commands in which all is sound, and the files that decide what they give.
_OUT = "output.dir=out device=cpu"
_BERT = f"model=local model.path=bert eval=[lama] data_dir=data compression=none {_OUT}"
_LLAMA = f"model=local model.path=llama eval=[lama] data_dir=data target=all {_OUT}"
_WINDOWS = "corpus.samples=2 corpus.length=8"
_DENSE = f"model=local model.path=llama data_dir=data compression=none {_OUT}"
_GGUF = "model=smollm2 model.package=kc_carrier model.requirement='kc-carrier==1' model.file=tiny.gguf"
_STREAM = "model.stream=true eval=[] target=all compression=rtn compression.group_size=8"
_COMMANDS = {
    "ask": _BERT,
    "compress": f"{_LLAMA} compression=rtn compression.group_size=8",
    "stream": f"model=local model.path=llama {_STREAM} {_OUT}",
    "c4": f"{_LLAMA} compression=wanda corpus=c4 {_WINDOWS}",
    "text": f"{_LLAMA} compression=wanda corpus=text corpus.path=data/text.txt {_WINDOWS}",
    "perplexity": f"{_DENSE} eval=[perplexity] eval.perplexity.window=8",
    "own task": f"{_DENSE} eval=[harness] eval.harness.tasks=[mine]",
    "stock task": f"{_DENSE} eval=[harness] eval.harness.tasks=[boolq]",
    "gguf": f"{_GGUF} eval=[perplexity] eval.perplexity.window=8 data_dir=data compression=none {_OUT}",
    "own part": f"{_LLAMA} compression=mine --config-dir conf",
}
COMMANDS: Mapping[str, Sequence[str]] = {name: command.split() for name, command in _COMMANDS.items()}
BERT, LLAMA = _BERT.split(), _LLAMA.split()
_READ = {
    "ask": """
        bert/config.json bert/model.safetensors bert/tokenizer.json bert/tokenizer_config.json
        data/lama/relations.jsonl data/lama/TREx/P1.jsonl
    """,
    "compress": "llama/model.safetensors.index.json llama/{shard} llama/config.json",
    "stream": "llama/model.safetensors.index.json llama/{shard} llama/tokenizer.json",
    "c4": "data/c4/sample.jsonl",
    "text": "data/text.txt",
    "perplexity": "data/wikitext2/test.raw.txt",
    "own task": "data/own/mine.yaml data/own/mine.jsonl",
    "stock task": "data/boolq/validation.jsonl",
    "gguf": "kc_carrier/tiny.gguf",
    "own part": "conf/compression/mine.yaml",
}
READ: Mapping[str, Sequence[str]] = {name: paths.split() for name, paths in _READ.items()}

# Settings that once ended in a stack trace or were accepted, and their kinds.
_WRONG = """
    seed=18446744073709551616 seed=-1 seed=1.5 seed=null seed=[1] device=[cpu] device=null device=3 device={a:1}
    dtype=[float32] dtype=null dtype=7 scoring_dtype=[model] scoring=slow scoring=null output.dir=null output.dir=
    output.dir=[a] limit=true limit=x limit=-1 limit=0 limit=1.5 limit=[1] run.force=maybe run.force=2 run.force=null
    run.plan=7 run.plan=perhaps run.retries=-1 run.retries=x run.retries=null run.detach=7 +foo=3 +run.foo=3
    +compression.foo=3 output.compressed_gb=-1 output.compressed_gb=lots output.compressed_gb=nan
    output.compressed_gb=null output.save_model=perhaps output.save_model=3 sparsity=nan sparsity=x sparsity=null
    sparsity=[0.2] sparsity=-0.1 sparsity=1 sparsity=inf reading=x reading=null reading=[module] data_dir=[data]
    data_dir=3 data_dir=data/text.txt data_dir=/nowhere model=null target=null compression=null recovery=null
    corpus=null tracker=null eval=null eval=lama,atlas eval=[none_such] model=[local] foo foo= =foo a=b=c
    model.path=a=b model.path= model.path=null model.path=[bert] ~model model~=x {a:1} run=3 output=3 output=null
    run=null hydra/launcher=none_such hydra/sweeper=none_such --config-dir=/nowhere --config-name=none_such
    +experiment=none_such experiment=x hydra.sweeper=3 compression=none_such target.roles=[none_such] target.roles=3
"""


def controls() -> Iterator[Trial]:
    """The commands as they should be."""
    for name, arguments in COMMANDS.items():
        yield Trial(f"{name}, nothing wrong", arguments, must=ACCEPT)


def issue() -> Iterator[Trial]:
    """Settings of the whole run."""
    for argument in _WRONG.split():
        yield Trial(argument, (*BERT, argument))
    for argument in ("run.rate=fast", "run.rate=nan", "run.rate=-1", "run.rate=0", "run.rate=[1]"):
        yield Trial(argument, (*BERT, "run.plan=true", argument))
    yield Trial("a group wider than a layer", (*LLAMA, "compression=rtn", "compression.group_size=1000"))
    yield Trial("more examples than documents", (*COMMANDS["own task"], "eval.harness.num_fewshot=100"))
    for value in ("-1", "x", "1.5", "[1]"):
        yield Trial(f"num_fewshot={value}", (*COMMANDS["own task"], f"eval.harness.num_fewshot={value}"))
    for value in ("[]", "3", "[3]", "null", "[none_such]", "{a:1}", "[[mine]]"):
        yield Trial(f"tasks={value}", (*COMMANDS["own task"], f"eval.harness.tasks={value}"))
    for argument in ("corpus.length=0", "corpus.length=100000", "corpus.samples=-1", "corpus.samples=x"):
        yield Trial(argument, (*COMMANDS["text"], argument))


# Parts that can be run here, each in a command in which all else is sound.
_TEXT = "corpus=text corpus.path=data/text.txt"
_TRAINING = f"compression=none recovery.training.tokens=64 recovery.training.batch_size=2 {_TEXT} corpus.length=8"
_TRAINED = {"lora": "", "prompt": "recovery.tokens=2", "prefix": "recovery.tokens=2", "idp": "", "concat": ""}
_RUNNABLE: Mapping[str, Mapping[str, str]] = {
    "compression": {
        path.stem: f"{_LLAMA} {_TEXT} {_WINDOWS}"
        for path in sorted((CONF / "compression").glob("*.yaml"))
        if path.stem != "none"
    },
    "recovery": {name: f"{_LLAMA} {_TRAINING} {more}" for name, more in _TRAINED.items()},
    "corpus": {
        name: f"{_LLAMA} compression=wanda {_WINDOWS} {more}"
        for name, more in {"c4": "", "text": "corpus.path=data/text.txt", "wikitext": "", "self": ""}.items()
    },
    "eval": dict.fromkeys(
        ("lama", "atlas", "perplexity", "latency", "similarity", "lens", "harness"), f"{_DENSE} limit=2"
    ),
    "model": {"local": _BERT},
    "target": {"att": f"{_LLAMA} compression=magnitude"},
}
_VALUES = ("{a: 1}", "[1, x]", "null", "text", "-7", "2.5", "nan", "99999999999999999999999", "''", "true")

_NEVER = ("-7", "99999999999999999999999")  # no number of any part is below zero, or longer than 64 bits


def settings() -> Iterator[Trial]:
    """Every declared field of every part, with values of every kind but its own; and its own kind out of all range."""
    for group, parts in _RUNNABLE.items():
        seen: set[tuple[type, str]] = set()
        for name, command in parts.items():
            part = _written(group, name)
            key, chosen = (f"eval.{name}", f"eval=[{name}]") if group == "eval" else (group, f"{group}={name}")
            kind = _class(part[name] if group == "eval" else part)
            if "group_size" in part:  # the layers are narrow
                command += f" {group}.group_size=8"
            for path, hint, owner in _fields(kind, key):
                if (owner, path.rpartition(".")[2]) in seen:
                    continue
                seen.add((owner, path.rpartition(".")[2]))
                for value in _VALUES:
                    fits = _fits(value, hint)
                    if fits is None:
                        continue
                    rest = tuple(one for one in command.split() if not one.startswith(f"{chosen.partition('=')[0]}="))
                    must = EITHER if fits and value not in _NEVER else REFUSE
                    yield Trial(f"{chosen}: {path}={value}", (*rest, chosen, f"++{path}={value}"), must=must)


def _written(group: str, name: str) -> dict[str, Any]:
    """What a choice's file says, and the files that it builds on."""
    part: dict[str, Any] = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    for base in part.get("defaults", ()):
        if isinstance(base, dict):  # a part inside this one, e.g. {"/compression@then": "none"}
            ((place, chosen),) = base.items()
            other, _, inside = place.removeprefix("/").partition("@")
            part = part | {inside: _written(other, chosen)}
        elif base != "_self_":
            part = _written(group, base) | part
    return part


def _class(part: Mapping[str, Any]) -> type:
    from hydra.utils import get_class

    return get_class(part["_target_"])


def _fields(kind: type, key: str) -> Iterator[tuple[str, Any, type]]:
    if not is_dataclass(kind):
        return
    hints = get_type_hints(kind)
    for one in fields(kind):
        if not one.init or one.name in ("report_to", "steps"):
            continue
        hint = hints[one.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _fields(hint, f"{key}.{one.name}")
        else:
            yield f"{key}.{one.name}", hint, kind


def _fits(value: str, hint: Any) -> bool | None:
    """Whether a value is of the kind that a field declares; None where that would be nothing wrong or is not known."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        found = [_fits(value, one) for one in arguments]
        return True if True in found else None if None in found else False
    if origin is Literal:
        return value in map(str, arguments)
    if hint is NoneType:
        return value == "null"
    if hint is Any:
        return None
    if hint is str:
        return value not in ("{a: 1}", "[1, x]", "null", "-7", "2.5", "nan", "99999999999999999999999", "true")
    if hint is bool:
        return value == "true"
    if hint is int:
        return value in ("-7", "99999999999999999999999")
    if hint is float:
        return value in ("-7", "2.5", "99999999999999999999999")
    if origin is not None and issubclass(origin, (Sequence, list, tuple)):
        return None if value == "[1, x]" else False
    return None


# What a config.json may say that it should not.
_CONFIG: Mapping[str, Sequence[Any]] = {
    "hidden_size": ["big", 0, -1, None, 1.5, [16], {"a": 1}, 17, True, 10**9, "16"],
    "num_hidden_layers": ["two", 0, -1, None, 2.5, 3, 1, [2], 10**9],
    "num_attention_heads": ["x", 0, -1, None, 3, 1.5, 10**6],
    "intermediate_size": ["x", 0, -1, None, 31, 10**12],
    "vocab_size": ["x", 0, -1, None, 5, 1000, 10**12],
    "max_position_embeddings": ["x", 0, -1, None, 1, 3, 10**12],
    "model_type": ["none_such", None, 3, [], {}, "", "gpt2", "t5", "llama", "../bert", "mamba"],
    "architectures": ["x", None, ["NoneSuch"], [3], {}],
    "hidden_act": ["none_such", None, 3, []],
    "dtype": ["float99", 3, [], {}, "int8", "complex64", "float8_e4m3fn"],
    "pad_token_id": [10**6, -1, "x", 1.5, []],
    "layer_norm_eps": ["x", -1, None, float("nan")],
    "type_vocab_size": ["x", 0, -1],
    "tie_word_embeddings": ["x", None, 3],
    "quantization_config": ["x", {}, {"quant_method": "none_such"}, {"quant_method": "gptq", "bits": 4}, []],
    "auto_map": ["x", {"AutoConfig": "evil.Config"}, 3],
    "transformers_version": [3, "x"],
}
_TOKENIZER_CONFIG: Mapping[str, Sequence[Any]] = {
    "mask_token": [None, 3, "none such", []],
    "pad_token": [None, 3, []],
    "unk_token": [None, []],
    "tokenizer_class": ["NoneSuch", 3, None, [], "T5Tokenizer"],
    "model_max_length": ["x", -1, 0, None],
    "padding_side": ["up", 3],
    "auto_map": [{"AutoTokenizer": ["evil.Tokenizer", None]}],
    "added_tokens_decoder": ["x", {"0": "y"}, {"x": {}}, []],
    "extra_special_tokens": ["x", 3, {"a": 1}],
}


def configurations() -> Iterator[Trial]:
    """Values of wrong kinds and sizes in the configurations of a model."""
    for file, values in (("config.json", _CONFIG), ("tokenizer_config.json", _TOKENIZER_CONFIG)):
        for key, wrong in values.items():
            for value in wrong:
                spoil = partial(set_key, f"bert/{file}", key, value)
                yield Trial(f"bert/{file}: {key}={value!r}", COMMANDS["ask"], spoil, EITHER)
    for key, value in (("pad_token_id", 10**6), ("num_key_value_heads", 3), ("head_dim", "x"), ("rope_theta", "x")):
        spoil = partial(set_key, "llama/config.json", key, value)
        yield Trial(f"llama/config.json: {key}={value!r}", COMMANDS["compress"], spoil, EITHER)
    for where in ("none_such.safetensors", "../bert/model.safetensors", "/etc/passwd", "", 3, None, ["x"], "."):
        for command in ("compress", "stream"):
            yield Trial(f"{command}: an index that names {where!r}", COMMANDS[command], partial(name_shard, where))
    for command in ("ask", "compress", "stream"):
        for edit in (wrong_shape, integer_weight, lost_weight, further_weight, not_finite, infinite):
            folder = "bert" if command == "ask" else "llama"
            must = (
                EITHER if (edit is further_weight or (command == "ask" and edit in (not_finite, infinite))) else REFUSE
            )
            yield Trial(f"{command}: {edit.__name__}", COMMANDS[command], partial(edit, folder), must)


def files() -> Iterator[Trial]:
    """Every file that the product reads, spoilt in every way."""
    for command, paths in READ.items():
        for path in paths:
            ways = {name: partial(spoilt, path, spoil) for name, spoil in SPOILS.items()}
            ways |= {f"flipped, seed {seed}": partial(flipped, path, seed) for seed in range(3)}
            for name, spoil in ways.items():
                decides = not (path.endswith(".yaml") or name == "with a byte order mark")
                about: dict[str, Any] = {"nobody": name == "unreadable", "decides": decides}
                yield Trial(f"{command}: {path} {name}", COMMANDS[command], spoil, EITHER, **about)


def stores() -> Iterator[Trial]:
    """Every file of a finished run, spoilt in every way, before the commands that read a store."""
    for command, rest in (("report", ("-o", "report.html")), ("advise", ("--keep", "95%"))):
        yield Trial(f"{command}, nothing wrong", ("store", *rest), must=ACCEPT, command=command)
        for path in ("config.yaml", "metrics.json", "report.json", "environment.json", "items.parquet"):
            for name, spoil in SPOILS.items():
                about: dict[str, Any] = {"command": command, "nobody": name == "unreadable"}
                harm = partial(spoilt, f"store/runs/pruned/{path}", spoil)
                yield Trial(f"{command}: {path} {name}", ("store", *rest), harm, EITHER, **about)


def folders() -> Iterator[Trial]:
    """Folders that are none, or hold nothing."""
    for name, spoil in {
        "gone": partial(gone, "bert"),
        "a file": partial(as_file, "bert"),
        "empty": partial(emptied, "bert"),
        "its own index": partial(as_link, "bert"),
        "an adapter's": partial(adapter_folder, "bert"),
    }.items():
        yield Trial(f"the model's folder {name}", COMMANDS["ask"], spoil)
    for name, spoil in {
        "gone": partial(gone, "data"),
        "a file": partial(as_file, "data"),
        "empty": partial(emptied, "data"),
    }.items():
        for command in ("ask", "c4", "own task", "stock task", "perplexity"):
            yield Trial(f"{command}: the data folder {name}", COMMANDS[command], spoil)
    yield Trial("an output folder that is a file", COMMANDS["ask"], partial(as_file, "out"))
    yield Trial("an output folder that nobody may write", COMMANDS["ask"], partial(closed, "."), nobody=True)
    yield Trial("a model folder that nobody may read", COMMANDS["ask"], partial(closed, "bert"), nobody=True)
    yield Trial("a data folder that nobody may read", COMMANDS["ask"], partial(closed, "data"), nobody=True)


KINDS: Mapping[str, Callable[[], Iterator[Trial]]] = {
    "controls": controls,
    "issue": issue,
    "settings": settings,
    "configurations": configurations,
    "files": files,
    "folders": folders,
    "stores": stores,
}
