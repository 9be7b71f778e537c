"""A causal language model as the engine runs it: its own forward over packed tokens, with keys and values in slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from slimtune.engine.slots import ATTENTION, KeyValueSlots, Piece, Step
from slimtune.errors import ConfigError, DoesNotFitError, check_whole, first_line
from slimtune.models.device import ram

LONGEST = 2048
"""The context where none is asked for, unless the model's own is shorter: memory for it is taken at the start."""

SLOTS = 16
"""Answers written at once where nothing else is asked for; fewer where the memory is short of them."""

_PROBE = 7
"""Tokens by which a model is tried."""


def causal_model_slots(model: Any, slots: int | None, context: int | None) -> KeyValueSlots:
    """Memory for the keys and values of a model that was tried in slots and answers there as by itself.

    Args:
        slots: None for the usual number, or as many as fit.

    Raises:
        ConfigError: it is no causal language model, its attention can't be run so, or the context is beyond its limit.
    """
    config = getattr(model, "config", None)
    if config is None or config.is_encoder_decoder or not (hasattr(model, "can_generate") and model.can_generate()):
        raise ConfigError(f"the engine runs causal language models of transformers, found a {type(model).__name__}")
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    length: int = min(own or LONGEST, LONGEST) if context is None else context
    check_whole("context", length, least=2)
    if own and length > own:
        raise ConfigError(f"a context of {length} is beyond the {own} positions of this model; choose less")
    like = next(model.parameters())
    if model.training:
        model.eval()
    shapes = _tried(model)
    count = _fitting_slots(model, shapes, slots, length)
    return KeyValueSlots(shapes, count, length, torch.empty(0, dtype=model.dtype, device=like.device))


def slot_bytes(shapes: Sequence[tuple[int, int, int]], context: int, itemsize: int, vocabulary: int) -> int:
    """What a slot takes: keys and values of a whole context, and its share of a step's logits.

    Args:
        shapes: heads, width of keys and width of values of each layer.
        itemsize: bytes of a number.
    """
    keys_values = context * itemsize * sum(heads * (keys + values) for heads, keys, values in shapes)
    # The logits of a step, in float64 while tokens are drawn, with their sorted copy and its order.
    return keys_values + 3 * 8 * vocabulary


def _fitting_slots(model: Any, shapes: Sequence[tuple[int, int, int]], slots: int | None, context: int) -> int:
    """How many slots are made. Raises: DoesNotFitError, where the machine hasn't the memory for them."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        machine = ram()
        free = machine.available if machine else None
    per_slot = slot_bytes(shapes, context, model.dtype.itemsize, model.get_input_embeddings().weight.shape[0])
    count = SLOTS if slots is None else slots
    if slots is None and free is not None:
        count = max(1, min(SLOTS, int(free // per_slot)))
    if free is not None and count * per_slot > free:
        raise DoesNotFitError(
            f"{count} slots of {context:,} tokens take {count * per_slot / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            f"free; {int(free // per_slot)} slots would fit, or a shorter context"
        )
    return count


@torch.inference_mode()
def _tried(model: Any) -> list[tuple[int, int, int]]:
    """The heads and widths of each layer's keys and values, of a model that answers in slots as by itself."""
    shapes: list[tuple[int, int, int]] = []
    reason = "its keys and values are not those of an attention over all tokens before"
    try:
        ids = (torch.arange(_PROBE) % model.get_input_embeddings().weight.shape[0]).tolist()
        with frozen_alone(model):
            by_itself = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True)
            layers = [(layer.keys, layer.values) for layer in by_itself.past_key_values.layers]
            # (heads, head_dim of keys, of values): DeepSeek's values are narrower than its keys.
            shapes = [(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in layers]
            expected_V = by_itself.logits[0, -1].float()
            in_slots_V = _in_slots(model, ids, KeyValueSlots(shapes, 2, _PROBE, layers[0][0])).float()
        answers = is_alike(model, in_slots_V, expected_V)
    except Exception as error:
        answers, reason = False, first_line(error)
    if not answers:
        raise ConfigError(f"a {type(model).__name__} can't be run in slots: {reason}; use model.generate()")
    return shapes


def is_alike(model: Any, logits: Tensor, expected: Tensor) -> bool:
    """Whether a model that is run in another way gives the logits that it should, both in float32."""
    # 16 bits differ by the order of sums; another attention would differ by much more.
    most = max(1e-5, float(expected.std()) * (0.02 if model.dtype.itemsize >= 4 else 0.3))
    return float((logits - expected).abs().max()) <= most


def _in_slots(model: Any, ids: list[int], memory: KeyValueSlots) -> Tensor:
    """The last logits of a prompt that is read in two pieces and a token, in the second slot."""
    logits_NV = torch.empty(0)
    with attention_by_name(model, ATTENTION):
        # A piece from nothing, one behind others, and a decoding step: the three paths of `Step.attend`.
        for start, end in ((0, 4), (4, _PROBE - 1), (_PROBE - 1, _PROBE)):
            # The second slot: in the first, a mistake in the slot's index would not show.
            piece = [Piece(1, start, end - start)]
            step = Step(memory, *((piece, []) if end - start == 1 else ([], piece)))
            with step.running():
                logits_NV = forward_of(model, ids[start:end], step.position_T, [end - start - 1], [])
            if step.layers != len(memory.keys):
                raise ConfigError(f"{step.layers} of its {len(memory.keys)} layers call transformers' attention")
    return logits_NV[-1]


@contextmanager
def attention_by_name(model: Any, name: str) -> Iterator[None]:
    """The model with another of the attentions that transformers knows by name."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def frozen_alone(model: Any) -> Any:
    """A block in which the model runs without any adapter."""
    state = vars(model).get("adapter_state")
    return nullcontext() if state is None else state.using(applied=())


def forward_of(
    model: Any, ids: Sequence[int], position_T: Tensor, kept: Sequence[int], virtual: Sequence[tuple[int, Tensor]]
) -> Tensor:
    """The logits (kept tokens, vocabulary) of packed tokens.

    Args:
        kept: the tokens behind which something is chosen, ascending.
        virtual: tokens that are read as vectors (dim,), by their place.
    """
    ids_1T = torch.tensor([ids], device=position_T.device)
    inputs: dict[str, Any] = {"input_ids": ids_1T}
    if virtual:
        embeds_1TD = model.get_input_embeddings()(ids_1T).clone()
        for place, vector_D in virtual:
            embeds_1TD[0, place] = vector_D.to(embeds_1TD.dtype)
        inputs = {"inputs_embeds": embeds_1TD}
    kept_N = torch.tensor(kept, device=position_T.device)
    logits = model(**inputs, position_ids=position_T[None], use_cache=False, logits_to_keep=kept_N).logits
    return logits[0]


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, as the model and its tokenizer name them."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)
