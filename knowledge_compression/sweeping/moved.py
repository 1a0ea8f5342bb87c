"""The line that reports a model that has changed on the hub since earlier runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from knowledge_compression.experiment import Experiment
from knowledge_compression.models.loading import HubModel
from knowledge_compression.results.earlier import contents_of
from knowledge_compression.results.store import RunStore

log = logging.getLogger(__name__)


def say_what_moved(experiments: Iterable[Experiment], store: RunStore) -> None:
    """Log one line for each hub model that finished runs in the store used at another commit."""
    sources = {
        (source.hub_id, source.revision): source
        for source in (experiment.source for experiment in experiments)
        if isinstance(source, HubModel)
    }
    for (hub_id, revision), source in sources.items():
        now = source.fingerprint().rpartition("@")[2]
        before = contents_of(store, hub_id, revision)
        others = {was.rpartition("@")[2]: runs for was, runs in before.items() if was.rpartition("@")[2] != now}
        if others and now != revision:  # the commit is known
            told = ", ".join(f"{commit[:8]} in {runs}" for commit, runs in sorted(others.items()))
            log.warning(
                "%s@%s is now commit %s; finished runs of %s used others (%s): they are kept but not compared with new "
                "ones; model.revision=COMMIT uses an earlier one",
                *(hub_id, revision, now[:8], store.folder, told),
            )
