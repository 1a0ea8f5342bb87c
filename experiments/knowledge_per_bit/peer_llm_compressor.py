"""llm-compressor on a CPU, in an environment of its own: see peer.py."""

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from peer import ASKED, DENSE, SAVED, left_out, timed, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

PRUNINGS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def asked(model: torch.nn.Module) -> Modifier:
    """What is to be done."""
    left = left_out(model)
    if "method" in ASKED:
        pattern = ASKED.get("pattern", "0:0")  # 0:0: unstructured
        sparsity = ASKED.get("sparsity", 0.5)  # the pattern sets it
        layers = [name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear) and name not in left]
        return PRUNINGS[ASKED["method"]](sparsity=sparsity, mask_structure=pattern, targets=layers)
    weights = {
        "num_bits": ASKED["bits"],
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "scale_dtype": torch.float16,
    }
    scheme = {"targets": ["Linear"], "weights": weights | {"group_size": ASKED["group_size"]}}
    return GPTQModifier(config_groups={"all": scheme}, ignore=left)


model = AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(DENSE)
text = [{name: ids[0].tolist() for name, ids in one.items()} for one in windows()]
with timed("llmcompressor", "compressed-tensors", "torch", "transformers"):
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=asked(model),
        dataset=Dataset.from_list(text),
        num_calibration_samples=len(text),
        max_seq_length=len(text[0]["input_ids"]),
        shuffle_calibration_samples=False,
    )
for name, parameter in model.named_parameters():
    if name.endswith("weight_scale"):  # float16 by now, but kept in the type of the weights
        parameter.data = parameter.data.half()
model.save_pretrained(SAVED, save_compressed="bits" in ASKED)
