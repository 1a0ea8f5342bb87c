"""Turning every failure to load a model into one line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from knowledge_compression.errors import BadInput, ModelUnavailable, first_line
from knowledge_compression.models.hub import hub_answers

log = logging.getLogger(__name__)

_SHARD = re.compile(r"[\w.-]+-\d+-of-\d+\.safetensors")


@contextmanager
def one_line_failures(where: str, name: str, allow_pickle: bool) -> Iterator[None]:
    """Turn every failure into one line; the body calls libraries that read the user's files."""
    try:
        yield
    except ModelUnavailable:
        raise
    except BadInput as error:
        raise BadInput(f"model={name}: {where} cannot be used: {error}") from None
    except Exception as error:  # libraries raise any kind of error for files that they do not expect
        log.debug("loading %s failed", where, exc_info=True)
        raise ModelUnavailable(_why_unavailable(where, name, error, allow_pickle)) from error


def _why_unavailable(where: str, name: str, error: Exception, allow_pickle: bool) -> str:
    message, local = str(error), Path(where).exists()
    if not local and not hub_answers():
        return (
            f"model={name}: '{where}' is not in the cache and the hub does not answer; "
            "give a local copy with model=local model.path=DIR"
        )
    if shard := _SHARD.search(message):  # some of the weights exist, so allowing pickles would not help
        return f"model={name}: {where} lacks {shard[0]}, one of its weight files; copy it there"
    if not allow_pickle and ("safetensors" in message and not isinstance(error, SafetensorError)):
        return (
            f"model={name}: {where} has no safetensors weights; a pickle checkpoint can run code and is refused "
            "unless model.allow_pickle=true"
        )
    if "trust_remote_code" in message:
        return f"model={name}: {where} needs to run its own code, which is refused unless model.trust_remote_code=true"
    if local:
        return f"model={name}: {where} cannot be read ({said(error)}); {_accepted(Path(where))}"
    return (
        f"model={name}: '{where}' is not in the cache and could not be downloaded ({said(error)}); "
        "give a local copy with model=local model.path=DIR"
    )


def _accepted(place: Path) -> str:
    """The kinds of folder that could be read instead."""
    from knowledge_compression.models.checkpoints.folder import readable, settings_of

    method, ours = (settings_of(place) or {}).get("quant_method"), readable()
    if method and method not in ours:
        known = ", ".join(ours)
        return f"it is compressed by {method}, which only transformers can read; this program reads {known} and GGUF"
    return "give a folder saved by save_pretrained"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress bars and reports: errors are raised, and the progress bars are this program's.

    The hub's bars stay: only they know how far a download is.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as their_logging

    verbosity, bars = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity_error()
    downloads_are_shown = not are_progress_bars_disabled()
    their_logging.disable_progress_bar()  # which disables the hub's, too
    if downloads_are_shown:
        enable_progress_bars()
    dispatching = logging.getLogger("accelerate.big_modeling")  # reports that a divided network is divided
    before = dispatching.level
    dispatching.setLevel(logging.ERROR)
    try:
        yield
    finally:
        dispatching.setLevel(before)
        their_logging.set_verbosity(verbosity)
        if bars:
            their_logging.enable_progress_bar()


def said(error: Exception) -> str:
    """A library's error message as one short line, with the error's class if that is unusual."""
    line = first_line(error)
    if line.endswith(":"):  # the reason follows
        line = first_line(ValueError(" ".join(str(error).split())))
    usual = isinstance(error, (OSError, ValueError, SafetensorError)) or line == type(error).__name__
    return line if usual else f"{type(error).__name__}: {line}"
