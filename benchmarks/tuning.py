"""Tuning of recoveries, compared with peft and transformers' own Trainer, in one run on one machine.

    python benchmarks/tuning.py --data-dir ../shared/data
    python benchmarks/tuning.py --data-dir ../shared/data --adapters lora --precisions bfloat16 --repeats 5
    python benchmarks/tuning.py --data-dir ../shared/data --torch-compile    ours with compiled blocks
    OMP_NUM_THREADS=1 python benchmarks/tuning.py --data-dir ../shared/data --clock cpu    on a machine that others use

LoRA of rank 4 and a prompt of 50 tokens for smollm2, on windows of C4. Both sides begin with the same values, read the
same windows in the same order, and take the same AdamW, learning rate, weight decay, clipping and number of steps; the
trained parameters are float32. The Trainer's ``bf16=True`` stands against our ``precision=bfloat16``, and float32
against float32. The seconds are those of whole trainings, without loading and tokenizing, after a warm-up of one step,
in which blocks are compiled. Losses are compared step by step: ``noise`` is what bfloat16 changes in the Trainer's own
curve.

Goal: at least 1.5 times the Trainer's tokens a second.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import in_turn, ratio, shared, spread, write
from torch import LongTensor, Tensor, nn

import knowledge_compression as kc
from knowledge_compression.models import Model
from knowledge_compression.objectives import NextToken
from knowledge_compression.training import TrainingSettings, _batch, train

GOAL = 1.5
RANK, ALPHA, PROMPT = 4, 16, 50
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def ours(model: Model, adapter: str) -> nn.Module:
    settings = {"rank": RANK, "alpha": ALPHA} if adapter == "lora" else {"tokens": PROMPT}
    model.network.requires_grad_(False)
    network: nn.Module = kc.choose(f"recovery={adapter}", **settings).trainable(model)
    return network


def stock(model: Model, adapter: str) -> nn.Module:
    from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

    if adapter == "lora":
        config: Any = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type=TaskType.CAUSAL_LM)
    else:
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=PROMPT)
    network: nn.Module = get_peft_model(model.network, config)
    return network


def by_train(windows: LongTensor, settings: dict[str, Any], precision: str) -> Callable[[nn.Module], list[float]]:
    """Our training loop."""

    def run(network: nn.Module) -> list[float]:
        losses, objective = [], NextToken()

        def watched(inner: nn.Module, ids: Any) -> tuple[Tensor, int]:
            loss, count = objective(inner, ids)
            losses.append(float(loss.detach()) / count)
            return loss, count

        train(network, windows, watched, TrainingSettings(**settings, precision=precision))
        return losses

    return run


def by_trainer(windows: LongTensor, settings: dict[str, Any], precision: str) -> Callable[[nn.Module], list[float]]:
    """transformers' Trainer on the windows in the order in which our loop takes them."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    ordered: list[Tensor] = [_batch(windows, TrainingSettings(**settings), step) for step in range(settings["steps"])]
    ids = torch.cat(ordered)
    labels = ids.clone()
    labels[:, 0] = -100  # after a prompt peft would predict the first token too, and divide by one token too few
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]

    def run(network: nn.Module) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=settings["batch_size"],
                max_steps=settings["steps"],
                learning_rate=settings["learning_rate"],
                lr_scheduler_type="constant",
                weight_decay=settings["weight_decay"],
                max_grad_norm=settings["clip"],
                train_sampling_strategy="sequential",
                bf16=precision == "bfloat16",
                use_cpu=True,
                logging_steps=1,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                save_strategy="no",
            )
            trainer = Trainer(model=network, args=arguments, train_dataset=rows)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return run


def measure(model: Model, adapter: str, windows: LongTensor, options: argparse.Namespace) -> dict[str, Any]:
    settings = {
        "steps": options.steps,
        "batch_size": options.batch,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 1e-5,
        "clip": 1.0,
    }
    torch.manual_seed(0)
    networks = {f"ours {precision}": ours(shared(model), adapter) for precision in options.precisions}
    # A network that one Trainer has prepared stays in its precision under another one, so each contestant has its own.
    networks |= {f"stock {precision}": stock(shared(model), adapter) for precision in options.precisions}
    begin = [parameter.detach().clone() for parameter in trained(next(iter(networks.values())))]
    curves: dict[str, list[float]] = {}

    def contestant(name: str, steps: int) -> Callable[[], None]:
        side, precision = name.split()
        chosen = {**settings, "steps": steps}
        if side == "ours":
            run = by_train(windows, chosen | {"torch_compile": options.torch_compile}, precision)
        else:
            run = by_trainer(windows, chosen, precision)

        def begin_and_train() -> None:
            with torch.no_grad():
                for parameter, value in zip(trained(networks[name]), begin, strict=True):
                    parameter.copy_(value)
            curves[name] = run(networks[name])

        return begin_and_train

    for name in networks:
        start = time.process_time()
        contestant(name, 1)()
        print(f"{adapter:7} {name:15} first step {time.process_time() - start:.0f} processor seconds", flush=True)
    contestants = {name: contestant(name, options.steps) for name in networks}
    rounds = in_turn(contestants, options.repeats, time.process_time if options.clock == "cpu" else time.perf_counter)
    tokens = options.steps * options.batch * options.length
    result: dict[str, Any] = {"settings": settings, "rounds": rounds, "losses": curves, "tokens": tokens}
    result["tokens_a_second"] = {name: spread([tokens / s for s in seconds]) for name, seconds in rounds.items()}
    for precision in options.precisions:
        mine, theirs = f"ours {precision}", f"stock {precision}"
        result[precision] = {
            "times_stock": ratio(rounds[theirs], rounds[mine]),
            "largest_loss_difference": apart(curves[mine], curves[theirs]),
        }
    if len(options.precisions) > 1:
        result["times_stock_float32"] = ratio(rounds["stock float32"], rounds["ours bfloat16"])
        result["noise"] = apart(curves["stock float32"], curves["stock bfloat16"])
    return result


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def show(adapter: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    for name, speed in result["tokens_a_second"].items():
        losses = result["losses"][name]
        print(f"{adapter:7} {name:15} {speed['median']:7.0f} tokens/s  loss {losses[0]:.4f} to {losses[-1]:.4f}")

    def line(label: str, times: dict[str, float], more: str) -> None:
        print(f"{adapter:7} {label}: {times['median']:.2f}x ({times['least']:.2f}-{times['most']:.2f}){more}")

    for precision in options.precisions:
        found = result[precision]
        differs = f"  losses differ by at most {found['largest_loss_difference']:.1e} nats"
        line(f"{precision} over the Trainer's {precision}", found["times_stock"], f"  goal {GOAL}x{differs}")
    if "noise" in result:
        line("bfloat16 over the Trainer's float32", result["times_stock_float32"], "")
        print(f"{adapter:7} noise: bfloat16 changes the Trainer's losses by at most {result['noise']:.1e} nats")


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = kc.choose("model=smollm2").load("cpu", "float32")
    stream = kc.choose("corpus=c4", data_dir=options.data_dir, length=options.length).token_stream(model)
    windows = stream[: len(stream) // options.length * options.length].view(-1, options.length)
    results = {}
    for adapter in options.adapters:
        results[adapter] = measure(model, adapter, windows, options)
        show(adapter, results[adapter], options)
    write("tuning", {"options": vars(options), "adapters": results})


def parse() -> argparse.Namespace:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("KC_DATA_DIR", str(beside)))
    parser.add_argument("--adapters", nargs="+", choices=["lora", "prompt"], default=["lora", "prompt"])
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument(
        "--torch-compile", action="store_true", help="ours with compiled blocks; the Trainer's stay plain"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="of a training")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 takes torch's own number")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
