"""Who runs when: answers are admitted to slots, prompts are read in pieces, tokens are chosen and handed on.

A step takes one token of every answer that is being written and up to `prefill_chunk` tokens of prompts, whatever
their adapters. Adapters that change parameters which all rows share get a forward of their own, in the same round.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.adapters.rows import BASE, RowAdapters
from slimtune.engine.adapters import ServedAdapter
from slimtune.engine.answer import Answer, Remains
from slimtune.engine.model import forward_of
from slimtune.engine.product import RowProduct
from slimtune.engine.request import FinishReason, TokenEvent
from slimtune.engine.sampling import SampledToken, sample
from slimtune.engine.slots import KeyValueSlots, Piece, Step
from slimtune.errors import first_line

_WORTH_WAITING = 16
"""Tokens that an answer must be spared to wait for a slot that reads them now."""
_LOOKED_AT = 64
"""How many of those who wait are looked at for one who needn't wait longer."""


@dataclass
class Counters:
    """What has happened since the start."""

    tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0


class Scheduler:
    """The answers of one model, in its slots.

    Attributes:
        lock: held while an answer goes from one place to another.
        waiting: answers without a slot, in their order.
        running: the others by slot.
        product: the joint products of the model's layers.
    """

    def __init__(
        self, model: Any, memory: KeyValueSlots, prefill_chunk: int, rank_budget: int, stop_tokens: frozenset[int],
        lock: threading.Condition,
    ) -> None:  # fmt: skip
        self._model, self._memory, self._prefill_chunk = model, memory, prefill_chunk
        self._stop_tokens = stop_tokens
        self.lock = lock
        self.product = RowProduct(rank_budget)
        self.waiting: deque[Answer] = deque()
        self.running: dict[int, Answer] = {}
        self.counters = Counters()
        # A free slot's keys and values stay where they are until the slot is written over.
        self._remains: dict[int, Remains] = {}

    @property
    def answers(self) -> list[Answer]:
        """All that have not ended."""
        with self.lock:
            return [*self.waiting, *self.running.values()]

    def forget(self, adapter: ServedAdapter) -> None:
        """Let go of what was kept of an adapter."""
        self.product.forget(adapter.attached_as)
        self._remains = {slot: r for slot, r in self._remains.items() if r.owner[1] != adapter.attached_as}

    def step(self) -> None:
        """A token for each answer that is being written, and a piece of the prompts."""
        self.drop_cancelled()
        self._admit()
        # None for all whose adapters go together: BitFit beside LoRA beside the base, one forward.
        groups: dict[ServedAdapter | None, list[Answer]] = {}
        for answer in self.running.values():
            groups.setdefault(answer.adapter if answer.adapter and answer.adapter.alone else None, []).append(answer)
        for alone, answers in groups.items():
            self._advance(answers, alone)
        self.counters.steps += bool(groups)

    def drop_cancelled(self) -> None:
        """End the answers that nobody wants any more."""
        with self.lock:
            gone = [answer for answer in self.answers if answer.handle.cancelled]
        for answer in gone:
            self._finish(answer, [TokenEvent(-1, "", finish_reason="cancelled")])

    def _admit(self) -> None:
        """Give free slots to those who wait, in their order; each begins with what its slot or another one knows.

        One that will know more once another slot has read on waits for that, while those behind it go ahead.
        """
        with self.lock:
            while len(self.running) < self._memory.slots:
                first = itertools.islice(self.waiting, _LOOKED_AT)
                answer = next((each for each in first if not self._will_share(each)), None)
                if answer is None:
                    return
                self.waiting.remove(answer)
                answer.slot, answer.read = self._place(answer)
                self._remains.pop(answer.slot, None)
                self.running[answer.slot] = answer
                self.counters.prompt_tokens += len(answer.tokens)

    def _place(self, answer: Answer) -> tuple[int, int]:
        """A free slot, and how many of the answer's positions it holds already."""
        free = [slot for slot in range(self._memory.slots) if slot not in self.running]
        known = {slot: self._shared(answer, remains.owner, remains.tokens) for slot, remains in self._remains.items()}
        for slot, other in self.running.items():
            # Running answers count too: requests with one system prompt share what the first of them has read.
            known[slot] = self._shared(answer, other.owner, other.tokens[: max(0, other.read - other.virtual)])
        # Of equally long ones a free slot, which needs no copy.
        best = max(known, key=lambda slot: (known[slot], slot in free), default=-1)
        if best >= 0 and known[best]:
            # The last token of a prompt is always read, for the logits behind it.
            slot = best if best in free else free[0]
            length = answer.virtual + known[best]
            if slot != best:
                self._memory.copy(best, slot, length)
            return slot, length
        # Low slots first: a step attends over the span of those that decode.
        slot = next((slot for slot in free if slot not in self._remains), free[0])
        if answer.adapter and answer.adapter.pairs:
            for layer, (keys_HND, values_HND) in enumerate(answer.adapter.pairs):
                self._memory.write(slot, layer, keys_HND, values_HND)
            return slot, answer.virtual
        return slot, 0

    def _will_share(self, answer: Answer) -> bool:
        """Whether a running answer is reading what this one begins with, and more of it than has been read so far."""
        for other in self.running.values():
            length = max(0, other.read - other.virtual) + _WORTH_WAITING
            is_read_on = other.owner == answer.owner and other.pending > 1 and length <= len(other.tokens)
            # The last token of a prompt is read in any case.
            if is_read_on and length < len(answer.tokens) and answer.tokens[:length] == other.tokens[:length]:
                return True
        return False

    def _shared(self, answer: Answer, owner: tuple[str, str], tokens: Sequence[int]) -> int:
        """How many tokens of a prompt a slot has read for the same tenant and adapter, but the last."""
        if owner != answer.owner:
            return 0
        most = min(len(tokens), len(answer.tokens) - 1)
        return next((i for i in range(most) if tokens[i] != answer.tokens[i]), most)

    @torch.inference_mode()
    def _advance(self, answers: list[Answer], alone: ServedAdapter | None) -> None:
        """One forward for these answers, and what comes of it."""
        try:
            ready, logits_NV = self._forward(answers, alone)
            chosen = sample(logits_NV, [answer.sampler for answer in ready]) if ready else []
        except Exception as error:
            by_adapter: dict[ServedAdapter | None, list[Answer]] = {}
            for answer in answers:
                by_adapter.setdefault(answer.adapter, []).append(answer)
            if len(by_adapter) > 1:
                # Whose fault it is shows when each adapter runs by itself; the others are answered.
                for own in by_adapter.values():
                    self._advance(own, None)
                return
            for answer in answers:
                self.fail(answer, first_line(error))
            return
        for answer, token in zip(ready, chosen, strict=True):
            try:
                self._take(answer, token)
            except Exception as error:
                self.fail(answer, first_line(error))

    def _forward(self, answers: list[Answer], alone: ServedAdapter | None) -> tuple[list[Answer], Tensor]:
        """The answers whose next token can be chosen now, with their logits (answers, vocabulary)."""
        decoding = [answer for answer in answers if answer.pending == 1]
        # Ascending slots, so that those which decode may be one contiguous view of the memory.
        decoding.sort(key=lambda answer: answer.slot)
        taken = [(answer, 1) for answer in decoding]
        # Decoding rows aren't charged: a long prompt may delay others by one chunk a step and no more.
        budget = self._prefill_chunk
        for answer in answers:
            length = 0 if answer.pending == 1 else min(answer.pending, budget)
            if length:
                budget -= length
                taken.append((answer, length))
        pieces = [Piece(answer.slot, answer.read, length) for answer, length in taken]
        step = Step(self._memory, pieces[: len(decoding)], pieces[len(decoding) :])
        ids, names, kept, ready, virtual = [], [], [], [], []
        for answer, length in taken:
            for position in range(answer.read - answer.virtual, answer.read - answer.virtual + length):
                if position < 0:
                    virtual.append((len(ids), answer.virtual_token(position)))
                ids.append(answer.tokens[position] if position >= 0 else 0)
            names += [answer.adapter.attached_as if answer.adapter else BASE] * length
            if length == answer.pending:
                kept.append(len(ids) - 1)
                ready.append(answer)
        # With nothing to choose yet one row of logits is computed all the same: no rows can't be shared out among
        # adapters.
        settings = self._settings(alone, names, kept or [0])
        with step.running(), settings:
            logits_NV = forward_of(self._model, ids, step.position_T, kept or [0], virtual)
        for answer, length in taken:
            # After the forward: one that failed has written nothing that counts.
            answer.read += length
        return ready, logits_NV

    def _settings(self, alone: ServedAdapter | None, names: list[str], kept: list[int]) -> Any:
        """Which adapters a forward runs through."""
        state = vars(self._model).get("adapter_state")
        if state is None:
            return nullcontext()
        if alone is not None:
            return state.using(applied=(alone.attached_as,), rows=None)
        return state.using(
            applied=(), rows=RowAdapters(tuple(names), kept=tuple(kept), packed=True, product=self.product)
        )

    def _take(self, answer: Answer, chosen: SampledToken | str) -> None:
        """Hand a token on, and end the answer where it is over."""
        if isinstance(chosen, str):
            self.fail(answer, chosen)
            return
        params = answer.request.sampling
        token = chosen.token
        answer.tokens.append(token)
        self.counters.tokens += 1
        reason: FinishReason | None = None
        if token in self._stop_tokens and not params.ignore_eos:
            text, reason = answer.text.finish(), "stop"
        else:
            answer.sampler.accept(token)
            text = answer.text.push(token)
            if answer.text.stopped:
                reason = "stop"
            elif answer.written >= params.max_tokens or answer.virtual + len(answer.tokens) >= self._memory.context:
                text, reason = text + answer.text.finish(), "length"
        event = TokenEvent(token, text, chosen.logprob, chosen.alternatives, reason)
        self._finish(answer, [event]) if reason else self._send(answer, [event])

    def fail(self, answer: Answer, error: str) -> None:
        """End an answer with what went wrong."""
        self._finish(answer, [TokenEvent(-1, "", finish_reason="error", error=error)])

    def _finish(self, answer: Answer, events: list[TokenEvent]) -> None:
        """Free the slot, which keeps what it has read for the next prompt that begins so."""
        with self.lock:
            if answer.slot >= 0:
                del self.running[answer.slot]
                is_sound = self._memory.clear_unless_finite(answer.slot, answer.read)
                read = answer.tokens[: max(0, answer.read - answer.virtual)] if is_sound else []
                self._remains[answer.slot] = Remains(answer.owner, read)
            else:
                self.waiting.remove(answer)
            if answer.adapter:
                answer.adapter.requests -= 1
        self._send(answer, events)

    def _send(self, answer: Answer, events: list[TokenEvent]) -> None:
        try:
            answer.on_events(events)
        except Exception:
            # Whoever asked can't be told; the others must go on.
            answer.handle.cancel()
