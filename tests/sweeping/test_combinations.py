"""The experiments of a sweep's combinations are those that Hydra composes, whatever is put together without it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from helpers.places import EXHAUSTIVE
from helpers.shipped import NEEDED, one_of_each_kind, shipped
from knowledge_compression.configuration import GROUPS, experiment_from
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.atlas import Atlas
from knowledge_compression.sweeping.cli import CONF
from knowledge_compression.sweeping.combinations import Composer, combinations
from knowledge_compression.sweeping.parts import Parts
from knowledge_compression.sweeping.sweeper import PlannedSweeper

pytestmark = pytest.mark.minutes

BEHIND = {"experiment=forgotten_or_displaced/older_triviaqa": "forgotten_or_displaced/table1"}
OVERLAYS = {f"experiment=forgotten_or_displaced/best_{name}" for name in ("gptq", "sparsegpt")}


class Sweep:
    """A sweep's combinations, in an order of no meaning."""

    def __init__(self, loader: Any, overrides: Sequence[str], jobs: list[list[str]] | None = None) -> None:
        self.jobs = jobs or combinations(OverridesParser.create().parse_overrides(list(overrides)))
        random.Random(0).shuffle(self.jobs)
        self._loader = loader
        self._master = _master(loader, tuple(overrides) if jobs else ())
        self._composer = Composer(self, self._master, self.jobs)  # type: ignore[arg-type]
        self._parts = Parts()
        self._by_hydra: dict[tuple[str, ...], Any] = {}
        self.composed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master: Any, job: list[str]) -> Any:
        self.composed += 1
        return self._composed(job)

    def _composed(self, job: list[str]) -> Any:
        if tuple(job) not in self._by_hydra:
            self._by_hydra[tuple(job)] = self._loader.load_sweep_config(self._master, job)
        return self._by_hydra[tuple(job)]

    def assembled(self, job: list[str]) -> Any:
        return self._parts.experiment(self._composer(job))

    def by_hydra(self, job: list[str]) -> Any:
        config = self._composed(job)
        return experiment_from(config, config.hydra.runtime.choices)

    def check(self) -> int:
        """Compare all of them; gives how often Hydra composed."""
        for job in self.jobs:
            assert self.assembled(job) == self.by_hydra(job), job
        return self.composed


@cache
def _master(loader: Any, overrides: tuple[str, ...]) -> Any:
    return loader.load_configuration("config", list(overrides), RunMode.MULTIRUN)


@pytest.fixture(scope="module")
def loader() -> Iterator[Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_shipped_choice_is_assembled_as_hydra_composes_it(
    group: str, loader: Any, request: pytest.FixtureRequest
) -> None:
    data = [f"data_dir={request.getfixturevalue('data_dir')}"] if group == "eval" else []
    for choice in one_of_each_kind(group):
        chosen = f"eval=[{choice.split('=')[1]}]" if group == "eval" else choice
        given = [*data, chosen, *NEEDED.get(choice, []), "reading=paper"]
        sweep = Sweep(loader, [*given, "sparsity=0.1,0.3", "seed=1,2"])
        first, *others = sweep.jobs
        sweep.assembled(first)
        for other in others:
            if EXHAUSTIVE or not set(first) & set(other) - {*given}:  # in which everything that is swept differs
                assert sweep.assembled(other) == sweep.by_hydra(other), other
        assert sweep.composed == 1
        called = sweep.by_hydra(first).choices
        assert group not in called or called[group] == choice.partition("=")[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "composed"),
    [
        (["target=att,ff", "compression=magnitude,random", "sparsity=0.1,0.2"], 4),
        (["model=bert_tiny,smollm2", "eval=[atlas],[atlas,perplexity]", "seed=1,2"], 4),
        (["compression.sparsity=0.2,0.4", "sparsity=0.1,0.3"], 1),
        (["compression.sparsity=0.2,'${sparsity}'", "sparsity=0.1,0.3"], 2),
        (["compression=gptq", "compression.bits=3,4", "corpus.samples=8,16"], 1),
        (["recovery=lora", "recovery.training.learning_rate=1e-3,1e-4", "+budget.tokens=1000,2000"], 2),
        (["recovery=lora", "recovery.training={batch_size:1},{batch_size:2}", "recovery.training.batch_size=3,4"], 4),
        (["recovery=lora", "recovery.training.batch_size=3,4", "recovery.training={batch_size:1},{batch_size:2}"], 4),
        (["compression.scope='${${which}}'", "++which=device,dtype", "device=global,layer", "dtype=layer,global"], 3),
        (["eval.atlas.limit=null,10", "eval.atlas.wordings=all,rotate", "output.compressed_gb=0,1"], 1),
        (["+experiment=cost_of_compression/small_magnitude,cost_of_compression/small_int8", "seed=0,1"], 2),
    ],
)
def test_whatever_overrides_do_to_each_other(overrides: list[str], composed: int, loader: Any) -> None:
    assert Sweep(loader, overrides).check() == composed


@pytest.mark.slow
@pytest.mark.parametrize("preset", shipped("experiment"))
def test_every_shipped_preset_is_assembled_as_hydra_composes_it(preset: str, loader: Any, data_dir: Path) -> None:
    """Some combinations of each, the composer having been told of all; and without a sweep it makes an experiment."""
    before = BEHIND.get(preset)  # an overlay of settings that only such a preset has
    group, _, name = preset.partition("=")
    given = [f"+{group}=[{before},{name}]" if before else f"+{preset}", f"data_dir={data_dir}"]
    config = loader.load_configuration("config", given, RunMode.MULTIRUN)
    assert experiment_from(config, config.hydra.runtime.choices).suites
    planned = OmegaConf.to_container(config.hydra.sweeper)
    sweeper = PlannedSweeper(planned.get("params"), planned.get("grids"))  # type: ignore[union-attr, arg-type]
    jobs = sweeper._jobs(list(config.hydra.overrides.task))
    assert len({tuple(job) for job in jobs}) == len(jobs)
    sweep = Sweep(loader, given, jobs)
    for job in sweep.jobs[: 4 if EXHAUSTIVE else 1]:
        try:
            expected = sweep.by_hydra(job)
        except BadInput as error:  # an overlay of another preset lacks what that chooses
            assert preset in OVERLAYS
            with pytest.raises(BadInput) as caught:
                sweep.assembled(job)
            assert str(caught.value) == str(error)
        else:
            assert sweep.assembled(job) == expected, job


@pytest.mark.parametrize(
    "overrides", [["sparsty=0.1,0.2"], ["compression.bits=3,4"], ["target=att,nothing"], ["sparsity=much,0.1"]]
)
def test_what_hydra_or_a_part_refuses_is_refused(overrides: list[str], loader: Any) -> None:
    sweep = Sweep(loader, overrides)
    refused = 0
    for job in sweep.jobs:
        try:
            expected: Any = sweep.by_hydra(job)
        except (BadInput, HydraException) as error:
            refused += 1
            with pytest.raises(type(error)) as caught:
                sweep.assembled(job)
            assert str(caught.value) == str(error)
        else:
            assert sweep.assembled(job) == expected
    assert refused


def test_what_a_part_reads_is_digested_once(loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    digest = Atlas.fingerprint
    monkeypatch.setattr(Atlas, "fingerprint", lambda self: asked.append(self) or digest(self))
    sweep = Sweep(loader, ["model=bert_tiny", "target=att,ff", "sparsity=0.1,0.2,0.3"])
    ids = {sweep.assembled(job).id for job in sweep.jobs}
    assert len(ids) == 6 and len(asked) == 1
    assert ids == {sweep.by_hydra(job).id for job in sweep.jobs}


def test_whole_numbers_stay_whole_however_long() -> None:
    asked = OverridesParser.create().parse_overrides(["seed=18446744073709551616,7", "sparsity=range(0.1,0.35,0.1)"])
    jobs = combinations(asked)
    assert [job[0] for job in jobs[::3]] == ["seed=18446744073709551616", "seed=7"]
    assert [job[1] for job in jobs[:3]] == ["sparsity=0.1", "sparsity=0.2", "sparsity=0.3"]
