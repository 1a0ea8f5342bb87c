"""What the documents name is there: links, files, make targets, options of modules, and commands that compose."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest
from hydra import compose, initialize_config_dir

from helpers.places import CONF, PACKAGE, ROOT
from knowledge_compression.configuration import experiment_from

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/*.md")])
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
# What stands for something of the reader's own.
PLACEHOLDERS = {"...", "…"}


def snippets(text: str) -> list[str]:
    """Lines of code blocks, continuations joined and comments dropped, and what stands in backticks."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(start: str) -> list[tuple[str, str]]:
    """Every command of the documents that begins like this: page and what follows."""
    return sorted(
        {(page, code) for page, text in TEXTS.items() for code in snippets(text) if code.startswith(f"{start} ")}
    )


def test_the_architecture_names_every_module_and_package_and_no_other():
    """Of the top level all; a table's cell may name several files of one folder, ``models/loading.py`` and others."""
    text = TEXTS["docs/architecture.md"]
    top = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert {name for name in top if name.removesuffix(".py") not in text} == set()
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.M)
    for row in rows:
        folder = PACKAGE
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", row):
            folder = (PACKAGE / name).parent if "/" in name.rstrip("/") else folder
            assert (PACKAGE / name).exists() or (folder / name).exists(), name


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", TEXTS[page])
    folder = (ROOT / page).parent
    missing = [link for link in links if "://" not in link and not (folder / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CHANGELOG.md"])
def test_every_file_that_is_named_is_there(page):
    ours = r"(?:conf|tests|docs|experiments|benchmarks|knowledge_compression)/[\w./-]*\w"
    named = {name for code in snippets(TEXTS[page]) for name in re.findall(rf"(?<![\w/.<-]){ours}", code)}
    folder = (ROOT / page).parent
    assert not [name for name in sorted(named) if not (ROOT / name).exists() and not (folder / name).exists()]


@pytest.mark.parametrize(("page", "command"), commands("make"))
def test_every_make_target_is_there(page, command):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(shlex.split(command)[1:]) <= targets


@pytest.mark.parametrize(("page", "command"), commands("python -m"))
def test_every_module_has_the_options_it_is_called_with(page, command, capsys):
    words = shlex.split(command)[2:]
    module = importlib.import_module(words[0])
    if not words[0].startswith("knowledge_compression"):
        return
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    offered = capsys.readouterr().out
    assert end.value.code == 0
    assert all(word.split("=")[0] in offered for word in words[1:] if word.startswith("-"))


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), [*commands("python run.py"), *commands("run.py")])
def test_every_run_command_makes_an_experiment(page, command, data_dir):
    alone = re.split(r"[;|]|&&", command.partition("run.py ")[2])[0]
    words = [word for word in shlex.split(alone) if word not in PLACEHOLDERS]
    if any(word.startswith("-") and word not in ("-m", "--multirun") for word in words):
        pytest.skip("a command for Hydra itself")
    overrides = [_first(word) for word in words if "=" in word and not word.startswith("data_dir=")]
    if any(re.search(r"\b(DIR|FILE|NAME|MODEL|PRESET|TINY)\b", word) for word in overrides):
        pytest.skip("names a place of the reader's own")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [*overrides, f"data_dir={data_dir}"], return_hydra_config=True)
    experiment_from(config, config.hydra.runtime.choices)


def _first(override: str) -> str:
    """The first of the values that a sweep goes through; a list in brackets is one value."""
    key, _, values = override.partition("=")
    return override if values.startswith("[") else f"{key}={values.split(',')[0]}"
