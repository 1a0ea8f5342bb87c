"""Where a large model fits, from the forecast of ``run.plan=true``, as a table in Markdown.

    python experiments/larger_models/fits.py

No network is needed: the sizes of the presets are in ``tests/published_sizes.yaml``. As with ``device_map=auto``, a
tenth of a GPU is left for activations. Memory is that of the forecast without libraries: to evaluate a model, its
weights and a fifth more; to compress it from disk to disk, a block and a fifth more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast

import knowledge_compression as kc
from knowledge_compression.compression.base import LayerByLayer
from knowledge_compression.compression.calibrated import Calibrated
from knowledge_compression.compression.kept import KeptModels
from knowledge_compression.configuration import conf_folder
from knowledge_compression.experiment import Experiment
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.targets import linear_layers
from knowledge_compression.recovery.none import NoRecovery
from knowledge_compression.results.store import RunStore
from knowledge_compression.sweeping.forecast import Forecaster
from knowledge_compression.sweeping.rehearsal import multiply_adds

SIZES = Path(__file__).parents[2] / "tests" / "published_sizes.yaml"
MODELS = ("llama_3_1_70b", "qwen3_235b_a22b", "llama_3_1_405b")
MACHINES = ((1, 80), (4, 80), (8, 80), (1, 141), (8, 141))  # GPUs, and 10^9 bytes of each
FREE = 0.9  # of a GPU, see models/spread.py
FORMS = {"8 bits": 8.0, "4 bits": 4.0 + 20 / 128}  # a weight; groups of 128 with a scale and a zero point
CALIBRATION = 128 * 2048  # tokens


def written(name: str, sizes: Mapping[str, Any], folder: Path) -> LocalModel:
    """A checkpoint's configuration and a tokenizer, without weights."""
    config = dict(sizes["config"])
    AutoConfig.for_model(config.pop("model_type"), **config, dtype="bfloat16").save_pretrained(folder / name)
    told = json.loads((folder / name / "config.json").read_text())
    (folder / name / "config.json").write_text(json.dumps(told | config))
    words = Tokenizer(WordLevel({"any": 0}, unk_token="any"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="any").save_pretrained(folder / name)
    return LocalModel(name, str(folder / name))


def planned(source: LocalModel, folder: Path) -> tuple[float, float, float]:
    """Bytes of memory to evaluate it, and to round it from disk to disk; multiply-adds of 1,000 tokens."""
    experiment = Experiment(
        source=source,
        target=kc.choose("target=all"),
        compression=kc.choose("compression=rtn"),
        recovery=NoRecovery(),
        corpus=kc.choose("corpus=self"),
        suites={},
        device="cpu",
        dtype="bfloat16",
        kept_models=KeptModels(0.0),
    )
    memory = []
    forecaster = Forecaster(RunStore(folder / "runs"), rate=1e14)
    for one in (experiment.dense(), replace(experiment, source=replace(source, stream=True))):
        (forecast, *_) = forecaster.of(one, source.name)
        memory.append(forecast.memory - forecaster.libraries)
    skeleton = source.skeleton()
    return *memory, multiply_adds(skeleton, forecaster.tokens_through(experiment, skeleton, 1000))


def where(needed: float, gpus: int, each: float) -> str:
    """Whether so many bytes fit on these GPUs: whole on one, divided over some, or the bytes without room."""
    room = FREE * each
    if needed <= room:
        return "on one"
    count = -(-needed // room)
    return f"divided over {count:.0f}" if count <= gpus else f"{(needed - gpus * room) / 1e9:.0f} GB elsewhere"


def streaming() -> tuple[list[str], list[str]]:
    """The shipped compressions that work from disk to disk, and those that do not."""
    names = sorted(path.stem for path in (conf_folder() / "compression").glob("[!_]*.yaml"))
    made = {name: kc.choose(f"compression={name}") for name in names if name != "none"}
    does = {name: isinstance(one, LayerByLayer | Calibrated) and one.streams for name, one in made.items()}
    return [name for name in does if does[name]], [name for name in does if not does[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="names in tests/published_sizes.yaml")
    sizes = yaml.safe_load(SIZES.read_text())
    rows: dict[str, list[str]] = {}
    models = parser.parse_args().models
    for name in models:
        with TemporaryDirectory() as scratch:
            source = written(name, sizes[name], Path(scratch))
            ask, stream, macs = planned(source, Path(scratch))
            skeleton = source.skeleton()
        linear = sum(layer.parameters for layer in linear_layers(skeleton) if layer.role != "final")
        rest = 2 * (skeleton.parameter_count() - linear)
        whole = 2.0 * skeleton.parameter_count()
        states = 2.0 * CALIBRATION * skeleton.text_config.hidden_size
        told = {"parameters": f"{skeleton.parameter_count() / 1e9:.1f} * 10^9", "weights in bfloat16": _size(whole)}
        told |= {f"{n} x {each} GB": where(whole, n, 1e9 * each) for n, each in MACHINES}
        told |= {"memory to evaluate it on a CPU, in bfloat16": _size(ask), "the same in float32": _size(2 * ask)}
        told |= {
            "memory to compress it from disk to disk": _size(stream),
            "the states of 128 x 2,048 calibration tokens, in addition": _size(states),
        }
        told |= {f"a file of {form}": _size(linear * bits / 8 + rest) for form, bits in FORMS.items()}
        told |= {"10^12 multiply-adds per 1,000 tokens": f"{macs / 1e12:.0f}"}
        for row, cell in told.items():
            rows.setdefault(row, []).append(cell)
    print(f"| | {' | '.join(models)} |\n|---|{'---|' * len(models)}")
    for row, cells in rows.items():
        print(f"| {row} | {' | '.join(cells)} |")
    does, does_not = streaming()
    print(f"\nFrom disk to disk: {', '.join(does)}; not: {', '.join(does_not)}.")


def _size(count: float) -> str:
    return f"{count / 1e9:.0f} GB" if count > 1e10 else f"{count / 1e9:.1f} GB"


if __name__ == "__main__":
    main()
