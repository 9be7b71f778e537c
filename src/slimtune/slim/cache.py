"""What a teacher says of a data set, on disk: k tokens for each learned one, and the mass of what isn't likely.

Three quarters of the k are the likeliest; the others are drawn from the rest, by their probability, so that the rest is
in the loss without bias (`losses.TopKTeacher`).

    manifest.json              what the teacher was asked, and the shards with their checksums
    teacher-00001.safetensors  ids (N, k) as uint16 or int32, log_probs (N, k) and rest (N,) in fp16, of whole examples

With k = 64 that is 258 bytes a token for vocabularies of up to 65,536 tokens, and 386 for larger ones. The folder is
named by a hash over teacher, tokenizer, examples, k and temperature, so that another loss or method finds it again. A
shard is there whole or not at all: a run that was broken off goes on behind the last one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtune.data.batches import IGNORED, Encoded
from slimtune.errors import DataError
from slimtune.ops.cross_entropy import rows_in_float
from slimtune.slim.losses import TopKTeacher
from slimtune.slim.readout import Readout, read_out, width_of
from slimtune.storage.atomic import staged_file, write_file
from slimtune.storage.permissions import write_tensors

MANIFEST = "manifest.json"
SHARD_TOKENS = 32_768
"""Learned tokens of a shard, about: 8 to 13 MB, and minutes of a small model's work on a CPU."""
BATCH_TOKENS = 2048
"""What the teacher reads at once."""


@dataclass(frozen=True)
class Request:
    """What the teacher is asked.

    Attributes:
        teacher: what tells its weights from others.
        width: how many tokens the student knows.
        k: how many tokens are stored.
        drawn: how many of these are drawn from all but the likeliest.
    """

    teacher: str
    tokenizer: str
    width: int
    k: int
    temperature: float
    drawn: int = 0

    def key(self, examples: Sequence[Encoded]) -> str:
        """A name for the answer to this request on these examples."""
        digest = hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode())
        for example in examples:
            digest.update(json.dumps([example.input_ids, example.labels]).encode())
        return digest.hexdigest()[:20]


def learned_places(example: Encoded) -> list[int]:
    """Where the tokens stand that predict a label: one before it."""
    return [place for place, label in enumerate(example.labels[1:]) if label != IGNORED]


class TeacherCache:
    """The stored answers to one request on some examples.

    Args:
        folder: of all caches; this one has its own within.

    Attributes:
        width: how many tokens teacher and student share, as far as the teacher was asked.

    Raises:
        DataError: a shard is damaged.
    """

    def __init__(self, folder: Path, request: Request, examples: Sequence[Encoded]) -> None:
        self.request, self.examples = request, examples
        self.folder = folder / request.key(examples)
        self.shards: list[dict[str, Any]] = []
        self.width = request.width
        if (self.folder / MANIFEST).is_file():
            self.width, self.shards = _read_manifest(self.folder)

    @property
    def done(self) -> int:
        """How many examples are stored."""
        return self.shards[-1]["stop"] if self.shards else 0

    @property
    def drawn(self) -> int:
        """How many of the stored tokens were drawn, of a vocabulary that may be smaller than k."""
        return min(self.request.drawn, min(self.request.k, self.width - 1) - 1)

    @property
    def bytes(self) -> int:
        """What the shards take on disk."""
        return sum((self.folder / shard["name"]).stat().st_size for shard in self.shards)

    def fill(self, teacher: Any, pad_id: int, on_examples: Callable[[int], None] = lambda count: None) -> None:
        """Ask the teacher what is missing, shard by shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.width = min(self.request.width, width_of(teacher))
        request = replace(self.request, width=self.width)
        for start, stop in _shards(self.examples, self.done):
            stored = _ask(teacher, self.examples[start:stop], request, pad_id, on_examples)
            self._write(start, stop, stored)

    def answers(self, numbers: Sequence[int]) -> TopKTeacher:
        """What is stored of these examples, one behind the other. Raises: DataError."""
        parts = [self._of(number) for number in numbers]
        ids, log_probs, rest = (torch.cat(column) for column in zip(*parts, strict=True))
        return TopKTeacher(ids, log_probs, rest, self.drawn)

    def _of(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        shard = next(shard for shard in self.shards if shard["start"] <= number < shard["stop"])
        offsets = _offsets(shard["counts"])
        rows = slice(offsets[number - shard["start"]], offsets[number - shard["start"] + 1])
        tensors = _load(self.folder / shard["name"])
        return tensors["ids"][rows], tensors["log_probs"][rows], tensors["rest"][rows]

    def _write(self, start: int, stop: int, stored: TopKTeacher) -> None:
        path = self.folder / f"teacher-{len(self.shards) + 1:05d}.safetensors"
        # torch indexes with no uint16, but stores it.
        ids = stored.ids.to(torch.uint16 if self.width <= 2**16 else torch.int32)
        with staged_file(path) as scratch:
            write_tensors(scratch, {"ids": ids, "log_probs": stored.log_probs, "rest": stored.rest})
        counts = [len(learned_places(example)) for example in self.examples[start:stop]]
        self.shards.append(
            {"name": path.name, "start": start, "stop": stop, "counts": counts, "sha256": _checksum(path)}
        )
        answered = vars(self.request) | {"width": self.width}
        write_file(self.folder / MANIFEST, json.dumps({"request": answered, "shards": self.shards}))


def _shards(examples: Sequence[Encoded], start: int) -> Iterator[tuple[int, int]]:
    """Ranges of examples from `start` on, each of about as many learned tokens as a shard has."""
    tokens = 0
    for number in range(start, len(examples)):
        tokens += examples[number].learned
        if tokens >= SHARD_TOKENS or number == len(examples) - 1:
            yield start, number + 1
            start, tokens = number + 1, 0


@torch.no_grad()
def _ask(
    teacher: Any, examples: Sequence[Encoded], request: Request, pad_id: int, on_examples: Callable[[int], None]
) -> TopKTeacher:
    """The teacher's answers on examples, in their order."""
    answers: dict[int, tuple[Tensor, ...]] = {}
    for chosen in _batches(examples):
        batch = [examples[number] for number in chosen]
        # (B, T), padded on the right, where nothing that comes before it can see it.
        longest = max(len(example.input_ids) for example in batch)
        ids = torch.tensor([e.input_ids + [pad_id] * (longest - len(e.input_ids)) for e in batch])
        mask = torch.tensor([[1] * len(e.input_ids) + [0] * (longest - len(e.input_ids)) for e in batch])
        readout = read_out(teacher, {"input_ids": ids.to(teacher.device), "attention_mask": mask.to(teacher.device)})
        for row, number in enumerate(chosen):
            places = torch.tensor(learned_places(examples[number]), dtype=torch.long, device=teacher.device)
            own = Readout(readout.hidden[row, places], readout.head)
            answers[number] = _top_k(own, request, _generator(examples[number], teacher.device))
        on_examples(len(chosen))
    in_order = zip(*(answers[number] for number in range(len(examples))), strict=True)
    ids, log_probs, rest = (torch.cat(column) for column in in_order)
    return TopKTeacher(ids, log_probs, rest)


def _batches(examples: Sequence[Encoded]) -> Iterator[list[int]]:
    """Numbers of examples of similar length, of few enough tokens together."""
    batch: list[int] = []
    for number in sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids)):
        if batch and (len(batch) + 1) * len(examples[number].input_ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def drawn_of(k: int) -> int:
    """How many of k stored tokens are drawn: a quarter. Fewer vary more, and more leave less for the likeliest."""
    return k // 4


def _generator(example: Encoded, device: torch.device) -> torch.Generator:
    """The same numbers for the same example, whatever it is asked together with."""
    seed = int.from_bytes(hashlib.sha256(json.dumps(example.input_ids).encode()).digest()[:8], "big", signed=True)
    return torch.Generator(device).manual_seed(seed)


def _top_k(readout: Readout, request: Request, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """ids (N, k), log-probabilities (N, k) and the log of the rest's mass (N,)."""
    count, k = readout.hidden.shape[0], min(request.k, request.width - 1)
    drawn = min(request.drawn, k - 1)
    chunk = rows_in_float(readout.hidden.device, request.width)
    parts = []
    for start in range(0, count, chunk):
        logits_CV = readout.logits(slice(start, start + chunk))[:, : request.width]
        log_p_CV = F.log_softmax(logits_CV.float() / request.temperature, dim=-1)
        top, ids = log_p_CV.topk(k - drawn)
        others_CV = log_p_CV.scatter(-1, ids, -torch.inf)
        rest = others_CV.logsumexp(-1)
        if drawn:
            # Where nothing is left but what rounding took, any token will do: it counts nothing.
            chances_CV = (others_CV - rest.unsqueeze(-1)).exp().nan_to_num_(1.0)
            more = torch.multinomial(chances_CV, drawn, replacement=True, generator=generator)
            ids = torch.cat([ids, more], dim=-1)
            top = torch.cat([top, log_p_CV.gather(-1, more).clamp(min=-60000.0)], dim=-1)
        # The smallest number of fp16 in place of -inf, which no JSON and no product likes.
        parts.append((ids.cpu(), top.half().cpu(), rest.clamp(min=-60000.0).half().cpu()))
    if not parts:
        return torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k).half(), torch.zeros(0).half()
    ids, log_probs, rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, log_probs, rest


@lru_cache(maxsize=64)
def _load(path: Path) -> dict[str, Tensor]:
    # Mapped into memory and not read: a data set's answers may be larger than memory.
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def _offsets(counts: Sequence[int]) -> list[int]:
    return torch.tensor([0, *counts]).cumsum(0).tolist()


def _read_manifest(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """The width, and the shards that are there whole. Raises: DataError, for what isn't as it was written."""
    way_out = "remove the folder, and the teacher is asked again"
    try:
        stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        width, shards = int(stored["request"]["width"]), stored["shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} can't be read ({error}); {way_out}") from error
    for shard in shards:
        path = folder / shard["name"]
        if not path.is_file():
            raise DataError(f"{path} is missing; {way_out}")
        if _checksum(path) != shard["sha256"]:
            raise DataError(f"{path} is damaged: it isn't what was written; {way_out}")
    return width, shards


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
