"""What the measurements need on disk: the folder of the base model, and an adapter that both sides load."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers

from benchmarks.worker import lora_config

MODEL = "smollm2-135m-instruct"


def model_folder() -> str:
    """The folder of the packaged SmolLM2."""
    from slimtune.storage.source import resolve

    return resolve(MODEL)


def write_adapter(folder: str, target: str) -> None:
    """An adapter in the format of peft, written by peft, with an effect: B is zero in a new one."""
    import peft

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model: Any = peft.get_peft_model(base, lora_config(peft))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(target)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    given, adapter = sys.argv[1:]
    folder = given or model_folder()
    write_adapter(folder, adapter)
    print(json.dumps({"folder": folder}))
