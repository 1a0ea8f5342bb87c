"""Tiny models of every architecture, made once from their configurations; no test here downloads anything."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import (
    PreTrainedTokenizerFast,
    logging,
)

import helpers.first_uses  # noqa: F401 - which are not to be done anew in every process
from helpers.commands import fresh_processes
from helpers.networks import TINY, build_network, make_tokenizer
from helpers.tasks import documents
from knowledge_compression.corpora.own_samples import DrawnSamples
from knowledge_compression.evaluation.tasks import LOCAL
from knowledge_compression.models import Model
from knowledge_compression.models.device import Device, is_exact

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: more threads would only get into each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that a test starts
    torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
settings.register_profile("any machine", deadline=None)  # no test fails for want of time
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The modules that take minutes begin first, so that no worker waits at the end for another's."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


@cache
def multiplies_int8() -> bool:
    """Whether this processor multiplies int8 exactly."""
    return is_exact(lambda left, right: torch._int_mm(left, right.T), torch.device("cpu"))


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process every machine computes as a plain processor does; tests of another kind hand in another value.

    Only int8 is multiplied as on this one, because without VNNI the products are wrong. Programs that a test starts see
    the machine as it is.
    """
    place = torch.device("cpu")
    plain = replace(Device.of(place), onednn_products=False, bfloat16_gain=1.0, int8_gain=4.0 * multiplies_int8())
    monkeypatch.setitem(Device.known, place, plain)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """See :func:`~helpers.networks.make_tokenizer`."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def _tiny_networks() -> dict[str, Any]:
    return {}


@pytest.fixture
def tiny_model(_tiny_networks: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Model]:
    """``tiny_model(architecture)`` gives a fresh copy that a test may compress; the original is made once a session."""

    def make(architecture: str) -> Model:
        if architecture not in _tiny_networks:
            _tiny_networks[architecture] = build_network(architecture)
        return Model(deepcopy(_tiny_networks[architecture]), tiny_tokenizer, f"tiny-{architecture}")

    return make


_QUICK = ("bert", "t5", "llama", "gpt2")  # one of each family, and transposed weights


@pytest.fixture(params=[pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in sorted(TINY)])
def any_tiny_model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Model]) -> Model:
    """A tiny model of every architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: ``$KC_DATA_DIR``, or ``shared/data`` beside the checkout; skips where it is missing."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("KC_DATA_DIR", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set KC_DATA_DIR)")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny BERT in a folder that ``model=local model.path=...`` reads."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    build_network("bert").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processes() -> Any:
    """Where tests start processes that they may kill: fresh ones, in which the heavy libraries are loaded already."""
    return fresh_processes()


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven small documents of every task, in the layout of a user's data folder."""
    folder = tmp_path_factory.mktemp("data")
    for task, entry in LOCAL.items():
        for path in entry["files"].values():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text("".join(json.dumps(documents(task, i)) + "\n" for i in range(7)))
    return folder


@pytest.fixture(scope="session")
def text():
    """Sentences in which one word decides the next, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 40, (24, 1), generator=generator)
    ids = 7 + (starts + 3 * torch.arange(16)) % 40
    return DrawnSamples("fixed", len(ids), 16, 0, ids=ids)


@pytest.fixture(scope="module")
def _browser() -> Iterator[Any]:
    """Headless Chromium, started once a module."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"], timeout=300_000
        )
        yield browser
        browser.close()


@pytest.fixture
def page_in_browser(_browser: Any) -> Iterator[Any]:
    """Opens a file in headless Chromium; what the console complains of fails the test."""
    problems, opened = [], []

    def open_page(path, *, complains=False, **settings):
        page = _browser.new_page(**settings)
        opened.append(page)
        page.set_default_timeout(300_000)  # a busy machine is no reason to fail
        if not complains:
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready=yes]")
        return page

    yield open_page
    for page in opened:
        page.close()
    assert not problems
