"""Ways in which a file or folder may be wrong: done to a copy of the sound material, in any process."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def set_key(path: str, key: str, value: Any, here: Path) -> None:
    """Say something else in a JSON file."""
    content = json.loads((here / path).read_text())
    (here / path).write_text(json.dumps(content | {key: value}))


def name_shard(where: Any, here: Path) -> None:
    """Let the index say that a weight lies elsewhere."""
    index = here / "llama" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = where
    index.write_text(json.dumps(content))


def _edit(folder: Path, edit: Callable[[dict[str, Any], str], None]) -> None:
    """Write the weights of the file that holds a projection anew."""
    from safetensors.torch import load_file, save_file

    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        within = (one for one in tensors if ("layers.0." in one or "layer.0." in one) and tensors[one].dim() == 2)
        if (name := next(within, None)) is not None:
            edit(tensors, name)
            save_file(tensors, path, {"format": "pt"})
            return
    raise AssertionError(f"{folder} holds no projection")


def wrong_shape(folder: str, here: Path) -> None:
    """One row less."""
    _edit(here / folder, lambda tensors, name: tensors.update({name: tensors[name][1:].clone()}))


def integer_weight(folder: str, here: Path) -> None:
    """A weight of integers."""
    _edit(here / folder, lambda tensors, name: tensors.update({name: tensors[name].mul(10).char()}))


def lost_weight(folder: str, here: Path) -> None:
    """A weight that is not there."""
    _edit(here / folder, lambda tensors, name: tensors.pop(name))


def further_weight(folder: str, here: Path) -> None:
    """A weight that no network knows."""
    _edit(here / folder, lambda tensors, name: tensors.update({"none.such": tensors[name].clone()}))


def not_finite(folder: str, here: Path) -> None:
    """A weight with one NaN."""
    _edit(here / folder, lambda tensors, name: tensors[name].view(-1)[3].fill_(float("nan")))


def infinite(folder: str, here: Path) -> None:
    """A weight with one infinity."""
    _edit(here / folder, lambda tensors, name: tensors[name].view(-1)[3].fill_(float("inf")))


def gone(path: str, here: Path) -> None:
    """Take a file or folder away."""
    shutil.rmtree(here / path) if (here / path).is_dir() else (here / path).unlink(missing_ok=True)


def as_file(path: str, here: Path) -> None:
    """A file in its place."""
    gone(path, here)
    (here / path).write_text("a file")


def emptied(path: str, here: Path) -> None:
    """An empty folder in its place."""
    gone(path, here)
    (here / path).mkdir()


def as_link(path: str, here: Path) -> None:
    """A link to itself in its place."""
    gone(path, here)
    (here / path).symlink_to(path)


def closed(path: str, here: Path) -> None:
    """Nobody may read or write it."""
    (here / path).chmod(0o711 if path == "." else 0o000)


def adapter_folder(path: str, here: Path) -> None:
    """The folder of an adapter of peft, with the configuration of the model that it belongs to."""
    (here / path / "model.safetensors").rename(here / path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "base_model_name_or_path": str(here / "llama"), "target_modules": ["query"], "r": 2}
    (here / path / "adapter_config.json").write_text(json.dumps(about))


def _found(path: str, here: Path) -> Path:
    if path.endswith("{shard}"):
        return sorted((here / path).parent.glob("*-00001-of-*.safetensors"))[0]
    return here / path


def spoilt(path: str, spoil: Callable[[bytes], bytes] | str, here: Path) -> None:
    """Spoil a file."""
    file = _found(path, here)
    if spoil == "gone":
        file.unlink()
    elif spoil == "folder":
        file.unlink()
        file.mkdir()
    elif spoil == "unreadable":
        file.chmod(0o000)
    elif isinstance(spoil, bytes):
        file.write_bytes(spoil)
    else:
        assert callable(spoil)
        file.write_bytes(spoil(file.read_bytes()))


def flipped(path: str, seed: int, here: Path) -> None:
    """One bit of it, wherever the seed says; the first bytes, which say what it is, more often than others."""
    file = _found(path, here)
    content, at = bytearray(file.read_bytes()), random.Random(f"{path}{seed}")
    place = at.randrange(min(64, len(content))) if seed == 0 else at.randrange(len(content))
    content[place] ^= 1 << at.randrange(8)
    file.write_bytes(content)


def half(content: bytes) -> bytes:
    """The first half."""
    return content[: len(content) // 2]


def without_its_end(content: bytes) -> bytes:
    """All but the last byte but one and what follows."""
    return content[:-2]


def without_its_beginning(content: bytes) -> bytes:
    """All but the first byte."""
    return content[1:]


def noise(content: bytes) -> bytes:
    """Random bytes, as many."""
    return random.Random(0).randbytes(len(content))


def zeros(content: bytes) -> bytes:
    """Zeros, as many."""
    return bytes(len(content))


def latin1(content: bytes) -> bytes:
    """A byte that is no UTF-8 in the middle."""
    return content[: len(content) // 2] + "é".encode("latin-1") + content[len(content) // 2 :]


def utf16(content: bytes) -> bytes:
    """The same text in UTF-16."""
    return content.decode("latin-1").encode("utf-16")


def with_mark(content: bytes) -> bytes:
    """With the mark that some editors set before UTF-8."""
    return b"\xef\xbb\xbf" + content


def with_nul(content: bytes) -> bytes:
    """A byte of zero in the middle."""
    return content[: len(content) // 2] + b"\0" + content[len(content) // 2 :]


def twice(content: bytes) -> bytes:
    """All of it, twice."""
    return content + content


SPOILS: Mapping[str, Any] = {
    "empty": b"",
    "half": half,
    "without its end": without_its_end,
    "without its beginning": without_its_beginning,
    "of noise": noise,
    "of zeros": zeros,
    "in Latin-1": latin1,
    "in UTF-16": utf16,
    "with a byte order mark": with_mark,
    "with a zero byte": with_nul,
    "twice": twice,
    "null": b"null\n",
    "a list": b"[]\n",
    "a number": b"3\n",
    "a word": b'"text"\n',
    "an empty object": b"{}\n",
    "of a list of lists": b"[" * 100_000,
    "of an endless number": b'{"a": 1' + b"0" * 10_000 + b"}",
    "gone": "gone",
    "a folder": "folder",
    "unreadable": "unreadable",
}
