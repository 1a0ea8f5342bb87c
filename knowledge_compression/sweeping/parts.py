"""The parts of a sweep's experiments: each is built, checked and digested once, however many combinations share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from knowledge_compression.configuration import made_of, put_together
from knowledge_compression.errors import BadInput
from knowledge_compression.experiment import Experiment
from knowledge_compression.results.store import RunStore
from knowledge_compression.sweeping.combinations import Composed


class Parts:
    """Builds experiments that share their common parts."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], Any] = {}
        self._checked: dict[tuple[Any, ...], BadInput | None] = {}
        self._done: dict[tuple[Any, ...], bool] = {}

    def experiment(self, composed: Composed) -> Experiment:
        """The experiment of a combination.

        Raises:
            BadInput: a value is missing, or has the wrong type or range.
        """
        return put_together(composed.settings, lambda group: self._part(group, composed), composed.choices)

    def check(self, experiment: Experiment) -> None:
        """As :meth:`Experiment.check`, once for all experiments of the same parts.

        Raises:
            BadInput: the model is not available, or has no layers of the target.
        """
        parts = (experiment.source, experiment.target, experiment.compression, experiment.recovery)
        ways = (experiment.device, experiment.dtype, experiment.scoring_dtype, experiment.save_model)
        key = (*map(id, parts), *ways, bool(experiment.suites))
        if key not in self._checked:
            self._checked[key] = _refusal(experiment.check)
        if (refusal := self._checked[key]) is not None:
            raise refusal

    def is_done(self, experiment: Experiment, store: RunStore) -> bool:
        """As :meth:`Experiment.is_done`; a run with which many are compared is read once."""
        key = (store.folder, experiment.id, experiment.save_model)
        if key not in self._done:
            self._done[key] = experiment.is_done(store)
        return self._done[key]

    def _part(self, group: str, composed: Composed) -> Any:
        key = (group, composed.texts.get(group, ""))
        if key not in self._made:
            self._made[key] = made_of(group, composed.settings.get(group))
        return self._made[key]


def _refusal(check: Callable[[], None]) -> BadInput | None:
    try:
        check()
    except BadInput as error:
        return error
    return None
