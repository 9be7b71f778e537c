"""One row of the report: what a model takes, how fast it is and what it lost, against the model of the first row.

It is measured in a process of its own, so that the memory is that of this model. The speeds are taken in turns with
the first model's, for the clock of a busy machine tells little by itself: what counts is their ratio.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimtune.adapters.constrain import zero_share
from slimtune.console.screen import open_screen
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.registry import read
from slimtune.evaluate.domain_texts import texts
from slimtune.evaluate.forgetting import MAX_LENGTH, all_passages, compare
from slimtune.evaluate.language_loss import Passage, losses
from slimtune.evaluate.scorers import EvaluationSettings
from slimtune.models.load import LoadOptions, load_model
from slimtune.pipeline.evaluation import evaluate_answers, held_out_questions
from slimtune.slim.engines import engines_by_format, engines_of
from slimtune.storage.atomic import write_file

TURNS, DECODED, PREFILL = 5, 24, 256
COMPARED_TOKENS = 2048
"""Over which KL and equal first choices are taken."""


@dataclass(frozen=True)
class SlimRow:
    """What was measured of one model.

    Attributes:
        bytes: of the weights' files.
        resident_bytes: of the process after the model's first answer.
        decode_speed: tokens a second, one by one; `decode_ratio` is against the first row, in turns.
        prefill_speed: tokens a second, read at once.
        perplexity: on the shipped texts.
        score: of the task, with its interval.
        kl: mean KL(first || this) a token, in nats.
        same_first: the share of tokens with the same likeliest one.
        forgetting: rise of the loss on the shipped texts, mean over domains, in nats a token.
        sparsity: share of zeros among the weights of the blocks' layers, as they are stored or expanded.
        engines: the programs that read it.
        seconds: that the step took.
    """

    name: str
    bytes: int
    resident_bytes: int
    decode_speed: float
    decode_ratio: float
    prefill_speed: float
    prefill_ratio: float
    perplexity: float
    score: float | None
    interval: tuple[float, float] | None
    kl: float
    same_first: float
    forgetting: float
    engines: list[str]
    sparsity: float = 0.0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self)


def measured(
    name: str, folder: str, first: str, data: DataSettings, evaluation: EvaluationSettings | None, seconds: float,
    losses_of_first: Path | None = None,
) -> SlimRow:  # fmt: skip
    """Measure a model's folder in a process of its own; raises what its loading raises.

    Args:
        losses_of_first: a file for the first model's losses on the shipped texts, which all rows need.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, name, folder, first, data, evaluation, seconds, losses_of_first).result()


@torch.inference_mode()
def measure(
    name: str, folder: str, first: str, data: DataSettings, evaluation: EvaluationSettings | None, seconds: float,
    losses_of_first: Path | None = None,
) -> SlimRow:  # fmt: skip
    """As `measured`, in this process."""
    model, tokenizer = load_model(folder, "text", LoadOptions(computes="tokens"))
    model.eval()
    prompt = torch.tensor([[5, 6, 7, 8]], device=model.device)
    _decode(model, prompt)
    resident = _resident_bytes()
    base = model if folder == first else load_model(first, "text", LoadOptions(computes="tokens"))[0].eval()
    decoding = _in_turns(base, model, lambda m: DECODED / _decode(m, prompt))
    long = torch.randint(5, 200, (1, PREFILL), generator=torch.Generator().manual_seed(0)).to(model.device)
    prefill = _in_turns(base, model, lambda m: PREFILL / _seconds(m, long))
    passages = all_passages(texts(), tokenizer, MAX_LENGTH)
    after = losses(model, tokenizer, passages).numpy()
    before = _kept(losses_of_first, lambda: after if base is model else losses(base, tokenizer, passages).numpy())
    kl, same = _against(base, model, passages)
    questions = held_out_questions(evaluation, read(data, "text"))
    result = evaluate_answers(open_screen(True), model, tokenizer, questions)
    return SlimRow(
        name, _weight_bytes(Path(folder)), resident, *decoding, *prefill,
        perplexity=math.exp(after.sum() / sum(passage.tokens for passage in passages)),
        score=result.score if result else None,
        interval=result.intervals.get(result.metric) if result else None,
        kl=kl, same_first=same, forgetting=compare(passages, before, after).difference,
        engines=engines_of(Path(folder), model, {"input_ids": long}) + engines_by_format(model),
        sparsity=zero_share(model), seconds=seconds,
    )  # fmt: skip


def _kept(path: Path | None, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """What a file holds, or what is computed and kept in it for the next row."""
    if path is not None and path.is_file():
        return np.array(json.loads(path.read_text(encoding="utf-8")))
    computed = compute()
    if path is not None:
        write_file(path, json.dumps(computed.tolist()))
    return computed


def _in_turns(base: Any, model: Any, speed: Any) -> tuple[float, float]:
    """The model's median speed, and the median ratio to the base's of the same turn."""
    if base is model:
        return median(speed(model) for _ in range(TURNS)), 1.0
    turns = [(speed(base), speed(model)) for _ in range(TURNS)]
    return median(own for _, own in turns), median(own / other for other, own in turns)


def _decode(model: Any, prompt: Tensor) -> float:
    """The seconds of an answer of DECODED tokens."""
    began = time.perf_counter()
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=DECODED, min_new_tokens=DECODED, **options)
    return time.perf_counter() - began


def _seconds(model: Any, ids: Tensor) -> float:
    began = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1)
    return time.perf_counter() - began


def _against(base: Any, model: Any, passages: list[Passage]) -> tuple[float, float]:
    """The mean KL(base || model), and the share of tokens whose likeliest one is the same."""
    divergence = same = tokens = 0.0
    for passage in passages:
        ids = torch.tensor([passage.encoded.input_ids], device=model.device)
        log_p, log_q = (m(input_ids=ids).logits[0].float().log_softmax(-1) for m in (base, model))
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        same += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        tokens += ids.numel()
        if tokens >= COMPARED_TOKENS:
            break
    return divergence / tokens, same / tokens


def _resident_bytes() -> int:
    """The resident set of this process, in bytes: the peak where the system doesn't tell the present."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
