"""A model as ONNX, written by optimum's program and compared by onnxruntime, both in an environment of their own.

optimum-onnx 0.1 needs a transformers below 4.58 and slimtune one above 5, so that no Python has both.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimtune.adapters.merge import Drift, compare_outputs
from slimtune.errors import ConfigError, MissingDependencyError, listing
from slimtune.export.program import run_program
from slimtune.models.export import outputs_on, probe_batches, refuse_beyond
from slimtune.quantization.dequantize import dequantize
from slimtune.storage.source import no_weight_bar

ONNX_FILE = "model.onnx"
_PROGRAM = "optimum-cli"
_TASKS = {
    "ForCausalLM": "text-generation-with-past",
    "LMHeadModel": "text-generation-with-past",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "Model": "feature-extraction",
}
"""optimum's tasks, by how the classes of transformers end."""
_MAX_KL, _MAX_KL_16_BITS = 1e-4, 0.01
"""How far the answers may drift by default: ONNX is float32, and what the model answers in 16 bits is rounded."""


def export_onnx(model: Any, tokenizer: Any, folder: Path, max_kl: float | None) -> Drift:
    """Write `model.onnx` into a folder; the model can't be used any more then.

    Args:
        model: with adapters, which are merged.

    Returns: How far the answers of onnxruntime are from the model's.

    Raises:
        MissingDependencyError: optimum's program isn't on the PATH.
        ConfigError: a model that isn't exported here.
        MergeError: optimum fails, or the answers drift further than the bound.
    """
    program, task = check_optimum(), _task(model)
    if tokenizer is None:
        raise ConfigError(
            "what ONNX computes is compared on texts, and this model has no tokenizer; save one beside it"
        )
    inputs = probe_batches(model, tokenizer)
    before = outputs_on(model, inputs)
    bound = _MAX_KL if model.dtype == torch.float32 else _MAX_KL_16_BITS
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    plain = folder / "plain"
    with no_weight_bar():
        dequantize(model).float().save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    _say_it_the_old_way(plain / "config.json")
    run_program([program, "export", "onnx", "--model", str(plain), "--task", task, str(folder)], _PROGRAM)
    shutil.rmtree(plain)
    # Transformers 4 reads no tokenizer that 5 wrote, and leaves it out without a word.
    tokenizer.save_pretrained(folder)
    drift = compare_outputs(before, _outputs_of(folder, program, inputs))
    refuse_beyond(bound if max_kl is None else max_kl, drift, f"{ONNX_FILE}, run by onnxruntime,", "keep the model")
    return drift


def check_optimum() -> str:
    """The path of optimum's program. Raises: MissingDependencyError."""
    program = shutil.which(_PROGRAM)
    if program is None:
        raise MissingDependencyError(
            f"ONNX is written by optimum, which is not installed: there is no {_PROGRAM} on the PATH; run `pip install "
            "optimum-onnx[onnxruntime]` in an environment of its own, since it needs an older transformers, and put "
            "the environment's bin folder at the end of the PATH"
        )
    return program


def _task(model: Any) -> str:
    names = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")]
    task = next((task for end, task in _TASKS.items() if names and names[0].endswith(end)), None)
    if task is None or model.config.is_encoder_decoder:
        raise ConfigError(
            f"ONNX of a {names[0] if names else type(model).__name__} isn't compared here, but of classes that end in "
            f"{listing(_TASKS, 5)}; merge it (slimtune merge), and export that by optimum-cli itself"
        )
    return task


def _say_it_the_old_way(file: Path) -> None:
    """Add the names by which transformers 4 reads rotations, which it would otherwise take to be the usual ones."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _outputs_of(folder: Path, program: str, inputs: list[dict[str, Tensor]]) -> Tensor:
    """The outputs of onnxruntime on all probes, a row for each position."""
    given, got = folder / "given.npz", folder / "got.npz"
    np.savez(given, *(probe["input_ids"].cpu().numpy() for probe in inputs))
    # The Python beside the program is the one that has onnxruntime.
    python = Path(program).resolve().with_name(f"python{Path(program).suffix}")
    run_program([str(python), "-c", _RUN, str(folder / ONNX_FILE), str(given), str(got)], "onnxruntime")
    with np.load(got) as arrays:
        outputs = [torch.from_numpy(arrays[name]).flatten(0, -2) for name in arrays.files]
    given.unlink()
    got.unlink()
    return torch.cat(outputs)


_RUN = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
outputs = []
given = np.load(sys.argv[2])
for name in given.files:
    ids = given[name]
    usual = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids),
             "position_ids": np.arange(ids.shape[1])[None]}
    feeds = {}
    for wanted in session.get_inputs():
        # Beside these, what was computed before: keys and values of no token.
        empty = [n if isinstance(n, int) else 1 if "batch" in n else 0 for n in wanted.shape]
        feeds[wanted.name] = usual[wanted.name] if wanted.name in usual else np.zeros(empty, np.float32)
    outputs.append(session.run([session.get_outputs()[0].name], feeds)[0])
np.savez(sys.argv[3], *outputs)
"""
