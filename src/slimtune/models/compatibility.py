"""Which engines take an adapter as it is, under which flags, and why others don't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.errors import listing
from slimtune.models.headers import StoredTensor

VLLM_DEFAULT_RANK = 16
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What its --max-lora-rank accepts."""
_CONSTRAINED = "its merged weights are held to a constraint, which is unknown to it; merge it first (slimtune merge)"
SERVED_WHOLE = {"classifier", "score"}


@dataclass(frozen=True)
class Verdict:
    """Whether an engine takes an adapter, with what it needs or the reasons against."""

    engine: str
    takes: bool
    note: str


def verdicts(config: dict[str, Any], tensors: Sequence[StoredTensor]) -> list[Verdict]:
    """What is known of each engine about this adapter."""
    rules: dict[str, Callable[[dict[str, Any], Sequence[StoredTensor]], tuple[list[str], str]]] = {
        "peft": _peft,
        "vLLM": _vllm,
        "llama.cpp": _llama_cpp,
    }
    answers = []
    for engine, rule in rules.items():
        against, note = rule(config, tensors)
        answers.append(Verdict(engine, not against, "; ".join(against) or note))
    return answers


def largest_rank(config: dict[str, Any]) -> int:
    """The largest rank of any module, which is what an engine has to make room for."""
    return max([config.get("r") or 0, *rank_pattern(config).values()])


def rank_pattern(config: dict[str, Any]) -> dict[str, int]:
    """The ranks of modules that have their own; AdaLoRA writes down which of its directions are left."""
    pattern = config.get("rank_pattern") or {}
    return {name: sum(rank) if isinstance(rank, list) else rank for name, rank in pattern.items()}


def _peft(config: dict[str, Any], tensors: Sequence[StoredTensor]) -> tuple[list[str], str]:
    peft_type = config.get("peft_type")
    if config.get("constraint"):
        return [_CONSTRAINED], ""
    if peft_type == "LORA":
        # Which every engine here began with; the other methods say it in their files, and those import torch.
        return [], "PeftModel.from_pretrained(model, folder)"
    from slimtune.core.config import methods

    # A method that isn't here may be one that `peft` alone has.
    own = methods().get(str(peft_type))
    against = [f"{peft_type} is unknown to it"] if own and not own.in_peft else []
    return against, "PeftModel.from_pretrained(model, folder)"


def _vllm(config: dict[str, Any], tensors: Sequence[StoredTensor]) -> tuple[list[str], str]:
    against = _not_plain(config, tensors)
    extra = set(config.get("modules_to_save") or ()) - SERVED_WHOLE
    if extra:
        against.append(f"modules_to_save ({listing(extra)}) is refused")
    if config.get("bias", "none") != "none":
        against.append(f"trained biases (bias={config['bias']}) are refused")
    # What the config may not say: files of other tools, and configs that were edited.
    others = [t.name for t in tensors if not _is_low_rank(t.name) and not _is_named(t.name, SERVED_WHOLE)]
    if others and not against:
        against.append(f"tensors beside A and B ({listing(others, 2)}) are refused")
    # By the tensors too: what a config said of ranks may be gone, or have been edited.
    stored = [t.shape[0] for t in tensors if ".lora_A." in t.name or ".lora_embedding_A" in t.name]
    rank = max([largest_rank(config), *stored])
    # It takes these values alone, and pads smaller ranks.
    room = next((size for size in VLLM_RANKS if size >= rank), None)
    if room is None:
        against.append(f"rank {rank} is above its largest, {VLLM_RANKS[-1]}")
    flag = f" --max-lora-rank {room}" if room and room > VLLM_DEFAULT_RANK else ""
    return against, f"vllm serve BASE --enable-lora{flag} --lora-modules NAME=FOLDER"


def _llama_cpp(config: dict[str, Any], tensors: Sequence[StoredTensor]) -> tuple[list[str], str]:
    against = _not_plain(config, tensors)
    other = [tensor.name for tensor in tensors if not _is_low_rank(tensor.name)]
    if other:
        against.append(f"its file has no place for {listing(other, 2)}")
    return against, "slimtune export FOLDER --to gguf-lora --output DIR"


def _is_low_rank(name: str) -> bool:
    parts = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")
    return any(part in name for part in parts) and not name.endswith("lora_B.bias")


def _is_named(name: str, modules: set[str]) -> bool:
    return not modules.isdisjoint(name.split("."))


def _not_plain(config: dict[str, Any], tensors: Sequence[StoredTensor]) -> list[str]:
    """Why this is not a plain LoRA; an empty list if it is."""
    if config.get("constraint"):
        return [_CONSTRAINED]
    if config.get("peft_type") != "LORA":
        return [f"{config.get('peft_type')} is not LoRA"]
    init = config.get("init_lora_weights", True)
    changes_base = isinstance(init, str) and init.lower().startswith(("pissa", "olora", "loftq", "corda"))
    reasons = {
        "DoRA is refused": config.get("use_dora") or any("lora_magnitude_vector" in t.name for t in tensors),
        "trained tokens are refused": config.get("trainable_token_indices")
        or any("token_adapter" in t.name or "trainable_tokens" in t.name for t in tensors),
        f"the initialisation {init} changed the base too": changes_base,
    }
    return [reason for reason, holds in reasons.items() if holds]
