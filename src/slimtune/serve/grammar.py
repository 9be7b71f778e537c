"""Answers that must match a JSON schema: llguidance says at each token which may come next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor

from slimtune.errors import ConfigError, first_line, require
from slimtune.serve.schema import check_schema

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class Grammars:
    """Makes constraints for the tokens of one model.

    Args:
        vocabulary: the width of the model's logits, which may be more than the tokenizer has.
        ends: the tokens that end an answer; one of them follows where the JSON is complete.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int]) -> None:
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, list(ends)

    @cached_property
    def _tokens(self) -> Any:
        require("llguidance", extra="serve", purpose="an answer by a JSON schema")
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self.tokenizer, n_vocab=self.vocabulary, eos_token=self.ends)

    def matching(self, schema: Mapping[str, Any]) -> JsonConstraint:
        """What holds an answer to a schema. Raises: ConfigError, for one that no JSON matches or can't be followed."""
        check_schema(schema)
        tokens = self._tokens
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the JSON schema can't be followed: {first_line(error)}") from error
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher)
        constraint = JsonConstraint(matcher, self.vocabulary, self.ends)
        # Where not even a first token is allowed, it is told here, before the request waits for its turn.
        constraint.mask()
        return constraint


def _refused(matcher: Any) -> ConfigError:
    """Why llguidance gave up; behind the first line it says where its parser stood."""
    return ConfigError(
        f"the JSON schema can't be followed: {(matcher.get_error() or 'no reason is given').splitlines()[0]}"
    )


class JsonConstraint:
    """A `TokenConstraint` by a matcher of llguidance."""

    def __init__(self, matcher: Any, vocabulary: int, ends: Sequence[int]) -> None:
        self._matcher, self._vocabulary, self._ends = matcher, vocabulary, ends

    def mask(self) -> Tensor:
        """(vocabulary,) of booleans: the tokens that may come next. Raises: ConfigError, where no JSON can follow."""
        if self._matcher.is_error():
            raise _refused(self._matcher)
        # The JSON is complete: anything but an end would follow it with text that no schema knows.
        if self._matcher.is_stopped():
            allowed = torch.zeros(self._vocabulary, dtype=torch.bool)
            allowed[self._ends] = True
            return allowed
        mask = self._matcher.compute_bitmask()
        # One that fails here allows an end, at which the answer would be over in the middle of its JSON.
        if self._matcher.is_error():
            raise _refused(self._matcher)
        # One bit a token, the lowest bit of a byte first: (vocabulary / 8,) bytes to (vocabulary,) booleans.
        bits = numpy.frombuffer(mask, dtype=numpy.uint8)
        return torch.from_numpy(numpy.unpackbits(bits, count=self._vocabulary, bitorder="little").view(numpy.bool_))

    def accept(self, token_id: int) -> None:
        """Go on behind this token. Raises: ConfigError, for one that the mask forbade, or a schema beyond limits."""
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token_id):
            raise _refused(self._matcher)
