"""The loop: admission, pieces of prompts, cancellation, reuse of what was read, adapters that come and go."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import slimtune
from slimtune.engine import scheduler
from slimtune.engine.engine import Engine
from slimtune.engine.request import Request, SamplingParams, TokenEvent
from slimtune.errors import AdapterExistsError, AdapterNotFoundError, ConfigError, DoesNotFitError, SlimtuneError
from small_text_model import tiny_model, tiny_tokenizer
from tensors import randomize

LONG = tuple(range(10, 60))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters on disk: three LoRAs, one bottleneck adapter, and one whose products are beyond float32."""
    made = {}
    for seed, name in enumerate(("one", "two", "three", "bottleneck", "overflow")):
        config = slimtune.BottleneckConfig(dropout=0.5) if name == "bottleneck" else slimtune.LoraConfig(r=4)
        model = randomize(slimtune, slimtune.get_peft_model(tiny_model(), config), seed=seed)
        if name == "overflow":
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(1e38)
        made[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(made[name])
    return made


def engine_of(tokenizer: Any, folders: dict[str, Path], *names: str, **options: Any) -> Engine:
    engine = Engine(tiny_model(), tokenizer, **{"slots": 2, "context": 96, "prefill_chunk": 16, **options})
    for name in names:
        engine.load_adapter(name, folders[name])
    return engine


@pytest.fixture
def started(tokenizer: Any, folders: dict[str, Path]) -> Iterator[Engine]:
    engine = engine_of(tokenizer, folders, "one", "two")
    engine.start()
    yield engine
    engine.stop(drain=False)


def ask(prompt: tuple[int, ...] = LONG, adapter: str | None = None, tenant: str = "", **options: Any) -> Request:
    return Request(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 5, **options}), adapter, tenant)


class Receiver:
    """Collects the events of a request."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.first, self.last = threading.Event(), threading.Event()

    def __call__(self, events: Any) -> None:
        self.events += events
        self.first.set()
        if self.events[-1].finish_reason:
            self.last.set()


@pytest.mark.parametrize(("slots", "chunk"), [(1, 7), (3, 1), (8, 64)])
def test_slots_and_pieces_change_no_answer(slots: int, chunk: int, tokenizer: Any, folders: dict[str, Path]) -> None:
    requests = [ask(LONG[: 3 + 5 * i], (None, "one", "bottleneck")[i % 3]) for i in range(7)]
    names = ("one", "bottleneck")
    expected = [engine_of(tokenizer, folders, *names).generate([request])[0] for request in requests]
    engine = engine_of(tokenizer, folders, *names, slots=slots, prefill_chunk=chunk)
    assert engine.generate(requests) == expected


def test_more_adapters_than_slots_are_all_answered(tokenizer: Any, folders: dict[str, Path]) -> None:
    engine = engine_of(tokenizer, folders, "one", "two", "three", "bottleneck", slots=2)
    done: list[tuple[int, int]] = []
    requests = [ask(adapter=name) for name in ("one", "two", "three", "bottleneck", None)]
    completions = engine.generate(requests, progress=lambda *count: done.append(count))
    assert [len(completion.tokens) for completion in completions] == [5] * 5
    assert done == [(count, 5) for count in range(1, 6)]


def test_only_the_same_tenant_and_adapter_reuse_what_was_read(tokenizer: Any, folders: dict[str, Path]) -> None:
    engine = engine_of(tokenizer, folders, "one", "two", slots=1, prefill_chunk=10)

    def steps(request: Request) -> int:
        before = engine.stats().steps
        engine.generate([request])
        return engine.stats().steps - before

    # 50 tokens are 5 pieces, the last of which gives the first of 5 tokens; with all but one read it is one piece.
    assert steps(ask(adapter="one", tenant="a")) == 9
    assert steps(ask(adapter="one", tenant="a")) == 5
    assert steps(ask(adapter="one", tenant="b")) == 9
    assert steps(ask(adapter="two", tenant="b")) == 9
    assert steps(ask(adapter=None, tenant="b")) == 9
    assert steps(ask(adapter=None, tenant="b")) == 5
    engine.unload_adapter("one")
    engine.load_adapter("one", folders["two"])
    assert steps(ask(adapter="one", tenant="b")) == 9


def test_what_a_running_slot_has_read_is_copied(tokenizer: Any, folders: dict[str, Path]) -> None:
    twice = [ask(max_tokens=20), ask((*LONG[:40], 7, 8), max_tokens=20)]
    engine = engine_of(tokenizer, folders)
    assert engine.generate(twice) == [engine_of(tokenizer, folders).generate([each])[0] for each in twice]


def test_a_cancelled_request_frees_its_slot_in_one_step(tokenizer: Any, folders: dict[str, Path]) -> None:
    engine = engine_of(tokenizer, folders, "one", slots=1)
    engine.start()
    running, waiting = Receiver(), Receiver()
    steps: list[int] = []

    def receive(events: Any) -> None:
        running(events)
        steps.append(engine.stats().steps)

    first = engine.submit(ask(max_tokens=40, ignore_eos=True), receive)
    second = engine.submit(ask(adapter="one"), waiting)
    assert running.first.wait(30)
    first.cancel()
    assert running.last.wait(30)
    assert waiting.last.wait(30)
    assert [event.finish_reason for event in running.events][-1] == "cancelled"
    # The step in which it is seen is the one behind the last token's.
    assert len(running.events) < 40
    assert steps[-1] - steps[-2] <= 1
    assert waiting.events[-1].finish_reason in ("length", "stop")
    second.cancel()
    engine.stop()
    assert engine.stats().free_slots == 1


def test_unloading_frees_and_waits_for_what_runs(started: Engine, folders: dict[str, Path]) -> None:
    before = started.stats().adapter_bytes
    assert before == 2 * started.adapters["one"].bytes > 0
    receiver = Receiver()
    started.submit(ask(adapter="one", max_tokens=30, ignore_eos=True), receiver)
    assert receiver.first.wait(30)
    started.unload_adapter("one")
    assert receiver.events[-1].finish_reason == "length"
    assert started.stats().adapter_bytes == before / 2
    assert not any("served_1" in name for name, _ in started.model.named_parameters())
    with pytest.raises(AdapterNotFoundError, match="there are two"):
        started.submit(ask(adapter="one"), receiver)
    with pytest.raises(AdapterExistsError, match="'two' is loaded already"):
        started.load_adapter("two", folders["three"])


def test_unloading_at_once_ends_its_requests_with_an_error(started: Engine) -> None:
    receiver, other = Receiver(), Receiver()
    started.submit(ask(adapter="one", max_tokens=40, ignore_eos=True), receiver)
    started.submit(ask(adapter="two"), other)
    assert receiver.first.wait(30)
    started.unload_adapter("one", wait=False)
    assert (receiver.events[-1].finish_reason, receiver.events[-1].error) == ("error", "the adapter 'one' was unloaded")
    assert other.last.wait(30)
    assert other.events[-1].finish_reason in ("length", "stop")


def test_adapters_are_loaded_while_others_are_answered(started: Engine, folders: dict[str, Path]) -> None:
    receiver = Receiver()
    started.submit(ask(adapter="one", max_tokens=40, ignore_eos=True), receiver)
    loaded = started.load_adapter("three.5@2", folders["three"])
    assert (loaded.name, loaded.method, loaded.rank) == ("three.5@2", "LORA", 4)
    (completion,) = started.generate([ask(adapter="three.5@2")])
    assert completion.tokens
    assert receiver.last.wait(30)
    assert len(receiver.events) == 40


@pytest.mark.parametrize("is_started", [True, False])
def test_adapters_come_and_go_by_many_threads(is_started: bool, tokenizer: Any, folders: dict[str, Path]) -> None:
    """Who loads goes over the modules of the model while others are put on it and taken off."""
    engine = engine_of(tokenizer, folders, "one")
    failures: list[BaseException] = []

    def come_and_go(number: int) -> None:
        try:
            for _ in range(12):
                engine.load_adapter(f"own {number}", folders["three"])
                engine.unload_adapter(f"own {number}")
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    if is_started:
        engine.start()
    try:
        threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        if is_started:
            engine.stop()
    assert not failures, failures
    assert set(engine.adapters) == {"one"}


def test_a_broken_adapter_leaves_the_engine_as_it_was(started: Engine, tmp_path: Path) -> None:
    expected = started.generate([ask(adapter="one")])
    with pytest.raises(SlimtuneError):
        started.load_adapter("missing", tmp_path)
    assert set(started.adapters) == {"one", "two"}
    assert started.generate([ask(adapter="one")]) == expected


def test_an_adapter_that_overflows_harms_nobody_else(tokenizer: Any, folders: dict[str, Path]) -> None:
    expected = engine_of(tokenizer, folders, "one").generate([ask(adapter="one"), ask()])
    engine = engine_of(tokenizer, folders, "one", "overflow")
    failed = Receiver()
    engine.submit(ask(adapter="overflow"), failed)
    assert engine.generate([ask(adapter="one"), ask()]) == expected
    assert failed.events[-1].finish_reason == "error"
    assert "not finite" in str(failed.events[-1].error)
    # Its slot is used again.
    assert engine.generate([ask(adapter="one"), ask()]) == expected
    with pytest.raises(SlimtuneError, match="an answer failed"):
        engine.generate([ask(adapter="overflow")])


def test_a_stopped_engine_ends_its_answers_and_takes_no_more(tokenizer: Any, folders: dict[str, Path]) -> None:
    engine = engine_of(tokenizer, folders, slots=1)
    before = engine.model.config._attn_implementation
    engine.start()
    receivers = [Receiver() for _ in range(3)]
    for receiver in receivers:
        engine.submit(ask(), receiver)
    engine.stop()
    assert [receiver.events[-1].finish_reason for receiver in receivers] == ["length"] * 3
    with pytest.raises(ConfigError, match="was stopped"):
        engine.submit(ask(), receivers[0])
    assert engine.model.config._attn_implementation == before
    engine.start()
    assert len(engine.generate([ask()])[0].tokens) == 5
    engine.stop(drain=False)


def test_an_engine_that_is_not_started_answers_several_threads_one_by_one(
    tokenizer: Any, folders: dict[str, Path]
) -> None:
    engine = engine_of(tokenizer, folders, "one")
    requests = [ask(adapter=name) for name in ("one", None, "one", None)]
    expected = [engine.generate([request]) for request in requests]
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        if number == 2:
            engine.load_adapter("two", folders["two"])
        found[number] = engine.generate([requests[number]])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == expected


def test_adapters_may_be_unloaded_while_the_engine_stops(tokenizer: Any, folders: dict[str, Path]) -> None:
    engine = engine_of(tokenizer, folders, "one", "two")
    engine.start()
    receiver = Receiver()
    engine.submit(ask(adapter="one", max_tokens=30, ignore_eos=True), receiver)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    engine.unload_adapter("two")
    engine.unload_adapter("one")
    stopping.join()
    assert receiver.events[-1].finish_reason == "length"
    assert engine.adapters == {}


def test_a_listener_that_fails_ends_its_own_request(started: Engine) -> None:
    def fail(events: Any) -> None:
        raise RuntimeError("gone")

    started.submit(ask(max_tokens=40), fail)
    assert len(started.generate([ask()])[0].tokens) == 5


@pytest.mark.parametrize(
    ("prompt", "message"),
    [(tuple(range(96)), "the prompt has 96 tokens, and the context of 96"), ((5, 512), "the token 512"), ((-1,), "-1")],
)
def test_prompts_that_do_not_fit_are_refused(
    prompt: tuple[int, ...], message: str, tokenizer: Any, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_of(tokenizer, folders).generate([ask(prompt)])


def test_models_that_can_not_be_run_so_are_refused(tokenizer: Any) -> None:
    from zoo import T5

    with pytest.raises(ConfigError, match="causal language models"):
        Engine(T5.model(), tokenizer)
    with pytest.raises(ConfigError, match="beyond the 512 positions"):
        Engine(tiny_model(), tokenizer, context=513)
    with pytest.raises(ConfigError, match="use_fast"):
        Engine(tiny_model(), object())


def test_slots_that_do_not_fit_are_refused_before_they_are_made(tokenizer: Any) -> None:
    with pytest.raises(DoesNotFitError, match=r"slots of 512 tokens take .* GB are free; \d+ slots would fit"):
        Engine(tiny_model(), tokenizer, slots=10**8)


def test_an_answer_ends_where_the_context_does(tokenizer: Any, folders: dict[str, Path]) -> None:
    (completion,) = engine_of(tokenizer, folders).generate([ask(max_tokens=500, ignore_eos=True)])
    assert (len(completion.tokens), completion.finish_reason) == (96 - len(LONG), "length")


def test_what_arrives_at_once_and_begins_alike_is_read_once(
    tokenizer: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for the first to have read what they share; who shares nothing goes ahead of them."""
    together = tuple(range(10, 90))
    requests = [ask((*together, 100 + number), "one") for number in range(4)]
    requests += [ask(tuple(range(95, 10, -1)), "one"), ask((*together, 105), "two"), ask((*together, 106), tenant="b")]
    alone = [engine_of(tokenizer, folders, "one", "two").generate([request])[0].tokens for request in requests]
    engine, counted = engine_of(tokenizer, folders, "one", "two", slots=7), []
    forward = scheduler.forward_of

    def counting(model: Any, ids: Any, *rest: Any) -> Any:
        counted.append(len(ids))
        return forward(model, ids, *rest)

    monkeypatch.setattr(scheduler, "forward_of", counting)
    assert [each.tokens for each in engine.generate(requests)] == alone
    answers = sum(len(tokens) for tokens in alone)
    # Four whole prompts, of another adapter and another tenant too, and of three the last token alone.
    assert sum(counted) <= 81 + 85 + 81 + 81 + 3 * 17 + answers
