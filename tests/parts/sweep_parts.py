"""Parts of an experiment to which mishaps happen: what sweeps are tested with.

A mishap is a file ``$MISHAPS/<place>`` that says what happens the first time an experiment comes by that place.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from knowledge_compression.compression.kept import KeptModels
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.corpora.text import TextFile
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import Evaluation, Suite, accuracy_metrics, item_table
from knowledge_compression.experiment import Experiment
from knowledge_compression.models import Model
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.targets import Target
from knowledge_compression.recovery.base import Recovered, Recovery, RecoveryReport, RestoresBy
from knowledge_compression.recovery.lora import Lora
from knowledge_compression.recovery.none import NoRecovery
from knowledge_compression.results import store
from knowledge_compression.results.tracker import NoTracker, Unseen
from knowledge_compression.training import TrainingSettings


def come_by(place: str) -> None:
    """Note in ``$MISHAPS/log`` that somebody was here, and let happen what is due."""
    folder = os.environ.get("MISHAPS")
    if folder is None:
        return
    with (Path(folder) / "log").open("a") as log:
        log.write(f"{place}\n")
    due = Path(folder) / place.replace("/", "-")
    try:
        mishap = due.read_text().strip()
        if not mishap.startswith("always"):
            due.unlink()  # it happens once
    except FileNotFoundError:
        return
    if mishap == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif mishap == "memory":
        hoard = [bytearray(b"x" * (1 << 26)) for _ in range(64)]  # 4 GiB, touched
        time.sleep(60)
        del hoard
    elif mishap.startswith("sleep"):
        time.sleep(float(mishap.split()[1]))
    else:
        raise RuntimeError(mishap)


@dataclass(frozen=True)
class Probe:
    """Asks for the word at a few places; every answer depends on all weights."""

    name: str = "probe"
    seconds: float = 0.0

    def evaluate(self, scorer: Scorer) -> Evaluation:
        model = scorer.model
        come_by(f"{self.name}")
        time.sleep(self.seconds)
        rows = []
        words = ["paris", "berlin", "rome", "dog", "gold", "moon"]
        for i, word in enumerate(words):
            prompt = f"{word} is the {model.tokenizer.mask_token} ."
            ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model.network(input_ids=ids).logits.log_softmax(-1)[0, 4]
            gold = model.tokenizer.convert_tokens_to_ids("the")
            row = {"suite": self.name, "task": "words", "id": f"words/{i}", "prompt": prompt, "gold": "the"}
            rank = int((logits > logits[gold]).sum()) + 1
            rows.append(row | {"correct": rank <= 20, "log_prob": float(logits[gold]), "rank": rank})
        come_by(f"after-{self.name}")
        items = item_table(rows)
        return Evaluation(accuracy_metrics(items) | {"log_prob": items["log_prob"].sum()}, items, {"words": len(words)})


@dataclass(frozen=True)
class Pair:
    """Two probes, asked one by one."""

    def parts(self) -> dict[str, Suite]:
        return {name: Probe(name) for name in ("second", "third")}

    def evaluate(self, scorer: Scorer) -> Evaluation:
        return self.joined({name: part.evaluate(scorer) for name, part in self.parts().items()})

    def joined(self, parts: Mapping[str, Evaluation]) -> Evaluation:
        items = pl.concat([part.items for part in parts.values()])
        return Evaluation(accuracy_metrics(items) | parts["third"].metrics, items, {"asked": list(parts)})


SUITES: Mapping[str, Suite] = {"probe": Probe(), "pair": Pair()}


@dataclass(frozen=True)
class StumblingModel(LocalModel):
    """A local model by whose loading mishaps come."""

    def load(self, device: str = "auto", dtype: str = "auto") -> Model:
        come_by("load")
        return super().load(device, dtype)


@dataclass(frozen=True)
class Stumbling(Magnitude):
    """Magnitude pruning by which mishaps come."""

    def compress(self, model: Model, targets: Any, calibration: Any) -> Any:
        come_by(f"compression-{self.sparsity}")
        report = super().compress(model, targets, calibration)
        come_by(f"after-compression-{self.sparsity}")
        return report


@dataclass(frozen=True)
class Nudge(Recovery):
    """A recovery that trains nothing and adds a constant to all that is no matrix."""

    by: float
    restores_by = RestoresBy.WEIGHTS

    def recover(self, model: Model, corpus: Any, report_to: Any = None) -> Recovered:
        come_by(f"recovery-{self.by:g}")
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.add_(self.by if parameter.ndim == 1 else 0.0)
        return Recovered(RecoveryReport("nudge"))


@dataclass(frozen=True)
class StumblingTracker(NoTracker):
    """Shows nothing; mishaps come by as training goes on and as a run is about to be written."""

    @contextmanager
    def track(self, run_id: str, settings: Mapping[str, Any]) -> Iterator[Unseen]:
        yield _Stumbler()


class _Stumbler(Unseen):
    def __init__(self) -> None:
        self._logged = 0

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._logged += 1
        if self._logged == 3:
            come_by("training")

    def finish_with(self, run: Any, model: Any = None) -> None:
        come_by("before-write")


def _stumbling(step: Any, place: str) -> Any:
    def stumble(*args: Any) -> Any:
        come_by(place)
        return step(*args)

    return stumble


def do_run(outputs: str, model: str, mishaps: str, suites: Sequence[str] = tuple(SUITES), trains: bool = False) -> None:
    """One experiment, in a process of its own, with a cache of its own beside the outputs."""
    os.environ |= {"MISHAPS": mishaps, "KC_CACHE_DIR": f"{outputs}-cache"}
    torch.set_num_threads(1)
    text = Path(f"{outputs}-text.txt")
    if trains and not text.exists():
        text.write_text(" ".join(["paris is the capital of france . the dog is not a wolf ."] * 100))
    training = TrainingSettings(steps=40, batch_size=2, checkpoint_every=10, learning_rate=1e-2)
    recovery = Lora(training=training, rank=2) if trains else NoRecovery()
    experiment = Experiment(
        source=StumblingModel("tiny", model),
        target=Target("all", ["encoder_att", "ff"]),
        compression=Stumbling(0.5),
        recovery=recovery,
        corpus=TextFile(name="text", path=str(text), samples=4, length=16),
        suites={name: SUITES[name] for name in suites},
        device="cpu",
        kept_models=KeptModels(1.0),
    )
    experiment.run(store.RunStore(outputs), StumblingTracker())


store._flush = _stumbling(store._flush, "write")
store._write_json = _stumbling(store._write_json, "half-written")
