"""A tokenizer of transformers as GGUF has it: the tokens, how they are joined, and how a text is split before.

Of llama.cpp's kinds of tokenizers four are written. For byte-level BPE it knows the regular expressions that split a
text by a name alone, so the expression in the tokenizer must be one of those it has (`_PRE`), or the file is refused.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from typing import Any, NoReturn

from slimtune.errors import ConfigError


class TokenType(IntEnum):
    """What a token is to llama.cpp."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Vocabulary:
    """The tokens by their ids, and what else a file says of the tokenizer."""

    model: str
    tokens: list[str]
    types: list[TokenType]
    pre: str = "default"
    scores: list[float] | None = None
    merges: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """The keys and values of the file."""
        values: dict[str, Any] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": [int(kind) for kind in self.types],
        }
        if self.scores is not None:
            values["tokenizer.ggml.scores"] = self.scores
        if self.merges is not None:
            values["tokenizer.ggml.merges"] = self.merges
        return values | self.settings


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_WORDS = r"%s|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_WORDS = r"%s|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2, _DIGITS = "byte-level words", "single digits"
_PRE: dict[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    (_DIGITS, _GPT2): "smollm",
    (_WORDS % (_CONTRACTIONS, r"\p{N}{1,3}"),): "llama-bpe",
    (_WORDS % (_CONTRACTIONS, r"\p{N}"),): "qwen2",
    (_CASED_WORDS % (_CASED % ("", ""), r"\p{N}"),): "tekken",
    (_CASED_WORDS % (_CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?"), r"\p{N}{1,3}"),): "gpt-4o",
}
"""llama.cpp's names for the ways in which a text is split."""


def vocabulary_of(tokenizer: Any, rows: int, eos_ids: list[int]) -> Vocabulary:
    """The vocabulary of a fast tokenizer for a model whose embedding has as many rows.

    Args:
        eos_ids: the tokens at which the model stops, beyond the tokenizer's own.

    Raises:
        ConfigError: a kind of tokenizer that the format doesn't know, or more tokens than rows.
    """
    stored = _stored(tokenizer)
    kind = stored["model"]["type"]
    if kind == "BPE" and stored["model"].get("byte_fallback"):
        vocabulary = _sentencepiece(stored)
    elif kind == "BPE":
        vocabulary = _byte_level(stored)
    elif kind == "WordPiece":
        vocabulary = _word_piece(stored)
    elif kind == "Unigram":
        vocabulary = _unigram(stored)
    else:
        raise ConfigError(
            f"a tokenizer of the kind {kind} can't be written as GGUF here (byte-level BPE, sentencepiece's BPE and "
            "Unigram, and WordPiece can); convert the model by llama.cpp's own script with --converter"
        )
    if len(vocabulary.tokens) > rows:
        raise ConfigError(
            f"the tokenizer has {len(vocabulary.tokens):,} tokens and the model embeds {rows:,}; resize the embeddings "
            "of the model, or pass the tokenizer that it was trained with"
        )
    # Rows without a token, which many models have to make their number a round one.
    spare = range(len(vocabulary.tokens), rows)
    vocabulary.tokens += [f"[PAD{number}]" for number in spare]
    vocabulary.types += [TokenType.UNUSED for _ in spare]
    if vocabulary.scores is not None:
        vocabulary.scores += [-10_000.0 for _ in spare]
    vocabulary.settings |= _special(tokenizer, kind, eos_ids)
    return vocabulary


def _stored(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"the tokenizer is a {type(tokenizer).__name__} without a tokenizer.json, which GGUF is made from; save it "
            "as a fast tokenizer first"
        )
    return json.loads(backend.to_str())


def _tokens(stored: dict[str, Any]) -> tuple[list[str], list[TokenType]]:
    """All tokens by their ids; those that were added after training are marked."""
    ids = dict(stored["model"]["vocab"])
    added = {token["content"]: token for token in stored["added_tokens"]}
    ids |= {content: token["id"] for content, token in added.items()}
    tokens = [f"[PAD{number}]" for number in range(max(ids.values()) + 1)]
    types = [TokenType.UNUSED] * len(tokens)
    for content, number in ids.items():
        tokens[number], types[number] = content, TokenType.NORMAL
        if content in added:
            types[number] = TokenType.CONTROL if added[content]["special"] else TokenType.USER_DEFINED
    return tokens, types


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list of its steps."""
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _byte_level(stored: dict[str, Any]) -> Vocabulary:
    tokens, types = _tokens(stored)
    steps = []
    for step in _steps(stored["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] in ("Isolated", "Removed"):
            steps.append(next(iter(step["pattern"].values())))
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append(_DIGITS)
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            steps += [_GPT2] if step.get("use_regex", True) else []
        else:
            steps.append(f"{step['type']} { ({k: v for k, v in step.items() if k != 'type'}) }")
    pre = _PRE.get(tuple(steps))
    if pre is None or not any(s["type"] == "ByteLevel" for s in _steps(stored["pre_tokenizer"], "pretokenizers")):
        raise ConfigError(
            f"this tokenizer splits a text by {' then '.join(steps) or 'nothing'}, a way that llama.cpp isn't known to "
            "have; convert the model by its own script with --converter"
        )
    if pre == "llama-bpe" and not stored["model"].get("ignore_merges"):
        # The same expression, where a word that is a token is still put together by merges.
        pre = "dbrx"
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    return Vocabulary("gpt2", tokens, types, pre, merges=merges)


def _sentencepiece(stored: dict[str, Any]) -> Vocabulary:
    """Joined by the score of what comes out, where a merge of tokenizers is joined by its place in a list."""
    tokens, types = _tokens(stored)
    rank: dict[str, int] = {}
    for result, _ in groupby("".join(m if isinstance(m, list) else m.split(" ")) for m in stored["model"]["merges"]):
        if result in rank:
            raise ConfigError(
                f"the merges of this tokenizer that give {result!r} have others between them, which the scores of GGUF "
                "can't express; convert the model by llama.cpp's own script with --converter"
            )
        rank[result] = len(rank)
    # Higher is joined first: the first merge has 0, the next -1; tokens that no merge makes come last.
    scores = [-float(rank[token]) if token in rank else -float(len(rank)) for token in tokens]
    unknown = stored["model"].get("unk_token")
    for number, token in enumerate(tokens):
        if token == unknown:
            types[number] = TokenType.UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and types[number] == TokenType.NORMAL:
            types[number] = TokenType.BYTE
        elif types[number] == TokenType.USER_DEFINED:
            # llama.cpp looks for added tokens in the text as it is typed, with spaces and not with the mark.
            tokens[number] = token.replace("\u2581", " ")
    normalizer = _steps(stored["normalizer"], "normalizers")
    metaspace = [s for s in _steps(stored["pre_tokenizer"], "pretokenizers") if s["type"] == "Metaspace"]
    prefix = any(step["type"] == "Prepend" for step in normalizer)
    prefix |= any(step.get("prepend_scheme", "always") != "never" for step in metaspace)
    settings = {"tokenizer.ggml.add_space_prefix": prefix}
    return Vocabulary("llama", tokens, types, scores=scores, settings=settings)


def _unigram(stored: dict[str, Any]) -> Vocabulary:
    """The likeliest way to cut a text, by the tokens' log probabilities; llama.cpp calls it by its first user, T5."""
    model = stored["model"]
    if model.get("byte_fallback"):
        _refuse_unigram("bytes for what is unknown")
    settings: dict[str, Any] = {}
    normalizer = _steps(stored["normalizer"], "normalizers")
    for step in [step for step in normalizer if step["type"] == "Precompiled"]:
        # sentencepiece's own table of replacements, which llama.cpp reads too.
        settings["tokenizer.ggml.precompiled_charsmap"] = base64.b64decode(step["precompiled_charsmap"])
        normalizer.remove(step)
    splits = _steps(stored["pre_tokenizer"], "pretokenizers")
    prefix = any(step.get("prepend_scheme") == "always" for step in splits)
    # Either a space before each word and no other, or spaces as they are typed: between these llama.cpp has nothing.
    if prefix and settings and [step["type"] for step in splits] == ["WhitespaceSplit", "Metaspace"]:
        merges_spaces = True
    elif [step["type"] for step in splits] == ["Metaspace"] and normalizer == (_MERGES_SPACES if prefix else []):
        merges_spaces = prefix
    else:
        _refuse_unigram(f"way to treat spaces by {json.dumps([*normalizer, *splits])}")
    names = [token for token, _ in model["vocab"]]
    # Cut word by word there, and as a whole here, which is the same unless a token reaches beyond a word.
    beyond = next((name for name in names if "\u2581" in name[1:]), None)
    if beyond is not None:
        _refuse_unigram(f"tokens that reach over a space, such as {beyond!r}")
    tokens, types = _tokens({**stored, "model": {"vocab": {name: number for number, name in enumerate(names)}}})
    types[model["unk_id"]] = TokenType.UNKNOWN
    scores = [score for _, score in model["vocab"]] + [0.0] * (len(tokens) - len(names))
    settings |= {"tokenizer.ggml.add_space_prefix": prefix, "tokenizer.ggml.remove_extra_whitespaces": merges_spaces}
    return Vocabulary("t5", tokens, types, scores=scores, settings=settings)


_MERGES_SPACES = [
    {"type": "Strip", "strip_left": False, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"},
]
"""What transformers makes of sentencepiece's remove_extra_whitespaces."""


def _refuse_unigram(what: str) -> NoReturn:
    raise ConfigError(
        f"llama.cpp's Unigram tokenizer has no {what}, which this one has; convert the model by its own script with "
        "--converter"
    )


def _word_piece(stored: dict[str, Any]) -> Vocabulary:
    normalizer = next((s for s in _steps(stored["normalizer"], "normalizers") if s["type"] == "BertNormalizer"), None)
    if normalizer is None or not normalizer["lowercase"]:
        raise ConfigError(
            "llama.cpp's WordPiece puts every text into lower case, and this tokenizer doesn't; the model can't be "
            "written as GGUF"
        )
    tokens, types = _tokens(stored)
    mark = stored["model"]["continuing_subword_prefix"]
    # There a token that begins a word has a mark, and one that continues it has none.
    marked = [
        token if kind == TokenType.CONTROL else token.removeprefix(mark) if token.startswith(mark) else f"\u2581{token}"
        for token, kind in zip(tokens, types, strict=True)
    ]
    return Vocabulary("bert", marked, types)


def _special(tokenizer: Any, kind: str, eos_ids: list[int]) -> dict[str, Any]:
    """The special tokens, which of them are put around a text, and the chat template."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
    values: dict[str, Any] = {}
    for name, key in names.items():
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            values[f"tokenizer.ggml.{key}_token_id"] = number
    if kind == "WordPiece":
        # llama.cpp begins a text with what is called bos, which BERT calls cls.
        values["tokenizer.ggml.bos_token_id"] = tokenizer.cls_token_id
    eos = tokenizer.eos_token_id
    further = [number for number in eos_ids if number != eos]
    if further:
        values["tokenizer.ggml.eot_token_id"] = further[0]
    if len(further) > 1:
        raise ConfigError(
            f"the model stops at {len(further) + 1} tokens, and a GGUF file names two; keep two of them in "
            "eos_token_id of generation_config.json"
        )
    # By what it does: the settings that say so differ from tokenizer to tokenizer.
    ids = tokenizer("a")["input_ids"]
    if tokenizer.bos_token_id is not None:
        values["tokenizer.ggml.add_bos_token"] = ids[0] == tokenizer.bos_token_id
    if tokenizer.eos_token_id is not None:
        values["tokenizer.ggml.add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        values["tokenizer.chat_template"] = template
    return values
