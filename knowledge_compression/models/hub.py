"""Whether there is a model hub to ask, found out once and quickly."""

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
    """Whether the hub (``HF_ENDPOINT``, else huggingface.co) answers at all; False where ``HF_HUB_OFFLINE`` is set.

    Any answer counts, a refusal too. Asked once a process.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # whatever the HTTP library of the day raises: no answer is no answer
        log.info("%s does not answer (%s); only what is cached can be loaded", constants.ENDPOINT, error)
        return False
    return True


@contextmanager
def cache_alone_where_no_hub_answers() -> Iterator[None]:
    """If the hub does not answer, make its client use the local cache alone.

    So a machine without a network neither waits nor fails for what it has. Every library that goes by
    ``huggingface_hub`` obeys this switch; ``local_files_only`` of ``from_pretrained`` still looks for a few files.
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
    """The commit that a model's revision stands for: on the hub, or where that does not say, in the local cache.

    Asked once a process, so that all runs of one process mean the same weights.
    """
    from huggingface_hub import HfApi

    if hub_answers():
        try:
            return HfApi().model_info(repository, revision=revision).sha
        except Exception as error:  # refused, or whatever the HTTP library of the day raises
            log.info("the hub does not say what %s@%s is (%s)", repository, revision, error)
    return cached_commit(repository, revision)


def cached_commit(repository: str, revision: str) -> str | None:
    """The commit that a model's revision stands for in the local cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(repository, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None
