"""Adapters whose update of each layer is of low rank, written as the LoRA that servers take: AdaLoRA, VeRA, LoHa.

dW = B A  with  A: (r, in), B: (out, r),  from the update itself, so that no method has to be known here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from slimtune.adapters.adapter import attached
from slimtune.adapters.model import PeftModel
from slimtune.core.config import PeftConfig
from slimtune.core.delta import Delta
from slimtune.core.frozen import Site
from slimtune.errors import AdapterFileError
from slimtune.methods.lora.config import LoraConfig
from slimtune.models.compatibility import VLLM_RANKS
from slimtune.storage.peft_format import save_adapter
from slimtune.storage.source import base_of, folder_of

CONVERTED = ("ADALORA", "VERA", "LOHA")
"""Methods that add an update of low rank and do nothing else."""
_EXACT = 1e-5
"""The largest share of an update that may be missing, which is what float32 rounds."""


def convert_to_lora(source: Path, output: Path) -> float:
    """Write an adapter as LoRA; the largest share of any layer's update that is missing in it.

    The base's weights are not read: an update of low rank does not depend on them.

    Raises:
        AdapterFileError: another method, an update that is of a higher rank, or one of something else than a weight.
    """
    config = PeftConfig.from_pretrained(source)
    if str(config.peft_type) not in CONVERTED:
        raise AdapterFileError(f"{config.peft_type} can't be written as LoRA; only {', '.join(CONVERTED)} can")
    if getattr(config, "constraint", None):
        raise AdapterFileError("an adapter under a constraint is its merged weight, which is no LoRA; merge it first")
    if getattr(config, "modules_to_save", None):
        raise AdapterFileError("an adapter with modules_to_save holds more than LoRA can")
    model = PeftModel.from_pretrained(_skeleton(base_of(source)), source)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    missing = 0.0
    for site, delta in attached(model, "default"):
        update_OI = _update(site, delta)
        pairs[site.name], lost = _factors(update_OI)
        missing = max(missing, lost)
    if missing > _EXACT:
        raise AdapterFileError(f"a LoRA of rank {VLLM_RANKS[-1]} would lack {missing:.1%} of a layer's update")
    rank = max(a_RI.shape[0] for a_RI, _ in pairs.values())
    tensors: dict[str, Tensor] = {}
    for name, (a_RI, b_OR) in pairs.items():
        # All of one rank, so that no server has to read patterns of ranks; the rows of zeros add nothing.
        more = rank - a_RI.shape[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.nn.functional.pad(a_RI, (0, 0, 0, more))
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.nn.functional.pad(b_OR, (0, more))
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(pairs), task_type=config.task_type)
    lora.base_model_name_or_path = config.base_model_name_or_path
    lora.inference_mode = True
    save_adapter(output, lora.to_dict(), tensors)
    return missing


def _skeleton(base: str) -> Any:
    """The base with memory in place of weights."""
    config = transformers.AutoConfig.from_pretrained(folder_of(base, weights=False))
    # No weight is allocated twice: built without memory, then given some, whose contents nobody reads.
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to_empty(device="cpu")


@torch.no_grad()
def _update(site: Site, delta: Delta) -> Tensor:
    """dW, (out, in). Raises: AdapterFileError, for a delta that changes anything else."""
    # Folded into zeros: a method that adds an update gives the update itself, and one that scales the weight gives
    # nothing.
    zeros = {name: torch.zeros_like(tensor) for name, tensor in site.base.dense(site.module).items()}
    folded = delta.fold(zeros)
    others = [name for name, tensor in folded.items() if name != "weight" and bool(tensor.any())]
    if site.kind != "linear" or others:
        raise AdapterFileError(f"the update of {site.name} is more than one of a linear layer's weight")
    return folded["weight"].float()


@torch.no_grad()
def _factors(update_OI: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
    """A and B of the lowest rank whose product is the update, and the share of it that they lack."""
    most = min(VLLM_RANKS[-1], *update_OI.shape)
    # Of as many directions as servers take at most; two power iterations, since beyond an update's rank there is
    # nothing but rounding.
    u_OR, s_R, v_IR = torch.svd_lowrank(update_OI.double(), q=most, niter=2)
    # Ten times below what may be lost: the sum of what is cut stays under the bound.
    kept = max(1, int((s_R > s_R[0] * _EXACT / 10).sum()))
    # Half of each singular value in either factor, so that neither is beyond the range of 16 bits.
    root_R = s_R[:kept].sqrt()
    a_RI, b_OR = (v_IR[:, :kept] * root_R).T.float().contiguous(), (u_OR[:, :kept] * root_R).float().contiguous()
    lost = torch.linalg.norm(update_OI - b_OR @ a_RI) / torch.linalg.norm(update_OI).clamp_min(1e-30)
    return (a_RI, b_OR), float(lost)
