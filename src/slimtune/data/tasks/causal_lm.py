"""Conversations whose answers are learned, and texts that are learned whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from slimtune.data.batches import Encoded, Limit, Objective, PackRows, pad_id_of
from slimtune.data.chat_template import use_template
from slimtune.data.encode import EncodedRows, WholeExamples, encode, encode_whole, fitted, refuse_split
from slimtune.data.packing import check_packs, pack
from slimtune.data.reading import SourceRows, Splits, drawn, exact_shares, names_of
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import HELD_OUT, EncodedDataset, Remark, Report, held_out_note, sample_of, skipped_note
from slimtune.data.texts import positions_of
from slimtune.errors import ConfigError, counted


def encode_sources(
    sources: Sequence[SourceRows], settings: DataSettings, tokenizer: Any, positions: int | None = None
) -> list[EncodedRows]:
    """Encode the rows of each source; `positions` is how many the model has. Raises: DataError."""
    limit, too_long, bad_rows = settings.max_length, settings.too_long, settings.bad_rows
    return [encode(source.rows, tokenizer, limit, too_long, source.places, positions, bad_rows) for source in sources]


def mixed(sources: Sequence[SourceRows], encoded: Sequence[EncodedRows], seed: int) -> list[Encoded]:
    """The examples of one epoch, drawn from the sources by their weights."""
    shares = exact_shares(sources, [len(rows.examples) for rows in encoded])
    pairs = zip(encoded, shares, strict=True)
    return [example for rows, share in pairs for example in drawn(rows.examples, share, seed)]


@dataclass(frozen=True)
class Conversations:
    """Conversations whose answers are learned, and texts that are learned whole."""

    splits: Splits
    settings: DataSettings
    seed: int = 0
    _whole: dict[Any, list[WholeExamples]] = field(default_factory=dict, init=False, repr=False, compare=False)

    task = "text"
    task_type = "CAUSAL_LM"
    model_task: ClassVar[Any] = "text"
    names: ClassVar[None] = None

    @classmethod
    def of(cls, splits: Splits, settings: DataSettings, seed: int = 0) -> Self:
        """The rows of all sources; raises ConfigError for conversations that would be split."""
        refuse_split([row for source in (*splits.train, *splits.held_out) for row in source.rows], settings.too_long)
        return cls(splits, settings, seed)

    def prepare(self, model: Any, tokenizer: Any) -> None:
        """Set the chat template; raises ConfigError for a model with an encoder, or one that can't pack."""
        if model.config.is_encoder_decoder:
            raise ConfigError(
                f"{model.name_or_path} has an encoder, which reads prompts on its own: train it with task=seq2seq"
            )
        if self.settings.chat_template is not None:
            use_template(tokenizer, self.settings.chat_template)
        if self.settings.packing:
            # Before hours of encoding and training: a model that mixes up its examples would learn all the same.
            check_packs(model)

    def whole(self, tokenizer: Any) -> list[WholeExamples]:
        """The examples of each source to train on, of any length: encoded once, for planning and for training."""
        # By its files, which both read. One that was made in memory has no name that would tell it from others.
        key = tokenizer.name_or_path or id(tokenizer), tokenizer.chat_template
        if key not in self._whole:
            bad_rows = self.settings.bad_rows
            sources = self.splits.train
            self._whole[key] = [encode_whole(s.rows, tokenizer, s.places, bad_rows) for s in sources]
        return self._whole[key]

    def encode(self, model: Any, tokenizer: Any) -> EncodedDataset:
        """The ids with what is learned of them; raises DataError, ConfigError if the model can't pack."""
        self.prepare(model, tokenizer)
        positions = positions_of(model)
        limit = Limit(self.settings.max_length, self.settings.too_long, positions)
        encoded = [fitted(whole, limit) for whole in self.whole(tokenizer)]
        held_out_rows = encode_sources(self.splits.held_out, self.settings, tokenizer, positions)
        held_out = [example for rows in held_out_rows for example in rows.examples]
        examples = mixed(self.splits.train, encoded, self.seed)
        tokens, learned = sum(len(e.input_ids) for e in examples), sum(e.learned for e in examples)
        report: Report = [
            *_sources_report(self.splits.train, encoded, self.settings),
            *(
                remark
                for source, rows in zip(self.splits.held_out, held_out_rows, strict=True)
                for remark in _losses(source.name, rows, self.settings, HELD_OUT)
            ),
            Remark(
                f"data: {counted(len(examples), 'example')}, {tokens:,} tokens of which "
                f"{learned / tokens:.0%} are learned; the longest has {max(len(e.input_ids) for e in examples):,}"
                + held_out_note(len(held_out), "examples ")
            ),
            sample_of(examples[0], tokenizer),
        ]
        facts = {
            "source": names_of(self.splits.train),
            "examples": len(examples),
            "held out": len(held_out),
            "tokens": f"{tokens:,}",
            "learned": f"{learned / tokens:.0%}",
            "maximum length": self.settings.max_length,
        }
        if not self.settings.packing:
            return EncodedDataset(examples, held_out, facts, report)
        # Held-out examples stay one a row, so that their loss compares with that of a run without packing.
        rows = pack(examples, room := self.settings.max_length)
        full = tokens / (len(rows) * room)
        report.append(Remark(f"packed into {len(rows):,} rows of at most {room:,} tokens, {full:.0%} full"))
        objective = Objective(PackRows.of(model, pad_id_of(tokenizer)))
        return EncodedDataset(rows, held_out, facts | {"packed rows": len(rows)}, report, objective)


def _sources_report(
    sources: Sequence[SourceRows], encoded: Sequence[EncodedRows], settings: DataSettings
) -> list[Remark]:
    """What each source holds, how many of it an epoch takes, and what became of long examples."""
    report: list[Remark] = []
    shares = exact_shares(sources, [len(rows.examples) for rows in encoded])
    for source, rows, share in zip(sources, encoded, shares, strict=True):
        weighted = ""
        if source.weight is not None:
            weighted = f"; of its {len(rows.examples):,} examples an epoch takes {share:,} (weight {source.weight:g})"
        report.append(Remark(f"{source.name}: format {source.format}, {counted(len(source.rows), 'row')}{weighted}"))
        report += _losses(source.name, rows, settings)
    return report


def _losses(source: str, rows: EncodedRows, settings: DataSettings, which: str = "") -> list[Remark]:
    """What became of the rows of a source that aren't examples as they are.

    Args:
        which: what the examples are called, such as "held-out ".
    """
    report, limit, unit = skipped_note(source, rows.skipped), settings.max_length, f"{which}example"
    if rows.apart:
        why = ": the chat template rewrites earlier turns, so each answer is learned in an example that ends with it"
        report.append(Remark(why, f"{counted(rows.apart, unit)} more than rows"))
    if rows.dropped:
        report.append(Remark(f": no answer within {limit:,} tokens", f"{counted(rows.dropped, unit)} dropped"))
    if rows.truncated:
        verb = "split" if settings.too_long == "split" else "cut"
        report.append(Remark(f" at {limit:,} tokens", f"{counted(rows.truncated, unit)} {verb}"))
    return report
