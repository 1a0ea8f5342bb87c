"""Whether the model hub answers, determined once and quickly."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

PATIENCE = 3.0  # seconds; the hub's own client tries six times over half a minute, for every file


@cache
def hub_answers() -> bool:
    """Whether the hub (``HF_ENDPOINT``, else huggingface.co) answers at all; False if ``HF_HUB_OFFLINE`` is set.

    Any answer counts, even a refusal. Asked once per process.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # any error of the HTTP library means that there is no answer
        log.info("%s does not answer (%s); only cached models and data can be loaded", constants.ENDPOINT, error)
        return False
    return True


@contextmanager
def cache_alone_where_no_hub_answers() -> Iterator[None]:
    """If the hub does not answer, make its client use only the local cache.

    A machine without a network then neither waits nor fails for cached files. Every library that uses
    ``huggingface_hub`` obeys this switch; ``local_files_only`` of ``from_pretrained`` still requests a few files.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


@cache
def commit_of(repository: str, revision: str) -> str | None:
    """The commit of a model's revision on the hub or, if the hub does not answer, in the local cache.

    Asked once per process, so that all runs of one process use the same weights.
    """
    from huggingface_hub import HfApi

    if hub_answers():
        try:
            return HfApi().model_info(repository, revision=revision).sha
        except Exception as error:  # a refusal, or any error of the HTTP library
            log.info("the hub does not report the commit of %s@%s (%s)", repository, revision, error)
    return cached_commit(repository, revision)


def cached_commit(repository: str, revision: str) -> str | None:
    """The commit of a model's revision in the local cache; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(repository, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def is_cached(repository: str, revision: str = "main", **_: object) -> bool:
    """Whether weights of a model's revision are in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(repository, file, revision=revision), str) for file in files)
