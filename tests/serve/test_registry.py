"""Adapters come and go under a running server: versions, room in memory, damaged ones, uses in between."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from slimtune import PromptTuningConfig, get_peft_model
from slimtune.engine.engine import Engine
from slimtune.errors import AdapterFileError, ConfigError
from slimtune.serve.local import EngineBackend
from slimtune.serve.registry import Registry, inside
from small_server import Started, save_adapter, started, wait_until
from small_text_model import tiny_model, tiny_tokenizer

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for number in range(4):
        save_adapter(root / f"a{number}", number)
    return root


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "adapters"))


@pytest.fixture
def server(folder: Path) -> Iterator[Started]:
    with started(folder) as running:
        yield running


def say(server: Started, model: str, **options: Any) -> str:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 10, **options}
    answer = server.client().chat.completions.create(model=model, messages=HELLO, **settings)
    return str(answer.choices[0].message.content)


def load(server: Started, name: str, path: str) -> Any:
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})


def unload(server: Started, name: str, **options: Any) -> Any:
    return server.post("/v1/unload_lora_adapter", {"lora_name": name, **options})


def engine_names(server: Started) -> set[str]:
    return set(server.gateway.backend.engine.adapters)  # type: ignore[attr-defined]


def test_adapters_wait_on_disk_until_they_are_used(server: Started) -> None:
    assert engine_names(server) == set()
    say(server, "a1")
    assert engine_names(server) == {"a1@1"}
    states = {m["id"]: m.get("state") for m in server.get("/v1/models").json()["data"]}
    assert (states["a0"], states["a1"]) == ("disk", "loaded")


def test_a_new_version_takes_the_name_and_the_old_one_stays(server: Started) -> None:
    first, other = say(server, "a0"), say(server, "a1")
    assert load(server, "a0", "a1").json()["root"] == "a0@2"
    assert say(server, "a0") == say(server, "a0@2") == other
    assert say(server, "a0@1") == first
    assert [m["id"] for m in server.get("/v1/models").json()["data"]][1:3] == ["a0@1", "a0"]
    unload(server, "a0@2")
    assert say(server, "a0") == first
    # A version that was given is not given again, or what is cached of one would be taken for the other.
    assert load(server, "a0", "a2").json()["root"] == "a0@3"
    unload(server, "a0")
    unload(server, "a0")
    assert load(server, "a0", "a2").json()["root"] == "a0@4"


@pytest.mark.parametrize("name", ["a0@0", "a0@2", "a0@", "a0@x", "@1", "a0@1@1", "a0@99999999999", "A0", ""])
def test_names_that_are_none(server: Started, name: str) -> None:
    answer = server.post("/v1/completions", {"model": name, "prompt": "x"})
    assert answer.status_code == (404 if name else 400)


def test_unloading_frees_memory_and_lets_what_runs_come_to_its_end(server: Started) -> None:
    say(server, "a0")
    before = server.gateway.backend.stats().adapter_bytes  # type: ignore[union-attr]
    assert before > 0
    stream = server.client().chat.completions.create(
        model="a0", messages=HELLO, temperature=0, max_tokens=150, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(unload(server, "a0").status_code))
    thread.start()
    wait_until(lambda: server.gateway.registry.find("a0") is None)
    with pytest.raises(openai.NotFoundError):
        say(server, "a0")
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length"
    thread.join()
    assert done == [200]
    assert server.gateway.backend.stats().adapter_bytes == 0  # type: ignore[union-attr]
    assert unload(server, "a0").status_code == 404


def test_force_breaks_answers_off_with_an_error(server: Started) -> None:
    stream = server.client().chat.completions.create(
        model="a0", messages=HELLO, temperature=0, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert unload(server, "a0", force=True).status_code == 200
    with pytest.raises(openai.APIError, match="broken off"):
        list(stream)
    assert engine_names(server) == set()


def test_loading_does_not_disturb_what_runs(server: Started) -> None:
    expected = say(server, "a0", max_tokens=150, extra_body={"ignore_eos": True})
    text = ""
    for number, chunk in enumerate(
        server.client().chat.completions.create(
            model="a0", messages=HELLO, temperature=0, max_tokens=150, stream=True, extra_body={"ignore_eos": True}
        )
    ):
        text += chunk.choices[0].delta.content or ""
        if number in (5, 15, 25):
            load(server, f"new{number}", "a2")
        if number in (10, 20):
            unload(server, f"new{number - 5}")
    assert text == expected


def test_idle_adapters_make_room_in_memory(folder: Path) -> None:
    size = (folder / "a0" / "adapter_model.safetensors").stat().st_size
    with started(folder, memory=int(2.5 * size)) as server:
        answers = {name: say(server, name) for name in ("a0", "a1", "a2", "a3")}
        assert engine_names(server) == {"a2@1", "a3@1"}
        say(server, "a2")
        assert say(server, "a0") == answers["a0"]
        assert engine_names(server) == {"a2@1", "a0@1"}, "the one that was idle for the longest goes"
        assert server.gateway.registry.evictions == 3


def test_more_adapters_at_once_than_memory_or_slots_hold(folder: Path) -> None:
    size = (folder / "a0" / "adapter_model.safetensors").stat().st_size
    with started(folder, memory=int(1.5 * size), slots=2) as server:
        alone = {name: say(server, name) for name in ("a0", "a1", "a2", "a3", "base")}
        answers: list[tuple[str, Any]] = []

        def run(name: str) -> None:
            answers.extend((name, say(server, name)) for _ in range(5))

        threads = [threading.Thread(target=run, args=(name,)) for name in alone for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Nobody is refused: who finds no room waits until an adapter's answers have ended.
        assert len(answers) == 2 * 5 * len(alone)
        assert set(answers) == set(alone.items())
        wait_until(lambda: server.gateway.queue.running == 0)


def test_an_adapter_too_large_for_the_memory_is_told(folder: Path) -> None:
    with started(folder, memory=10) as server:
        with pytest.raises(openai.InternalServerError, match="log says why"):
            say(server, "a0")
        assert say(server, "base")


@pytest.mark.parametrize("damage", ["cut", "config", "other base", "gone"])
def test_a_broken_adapter_leaves_the_server_up(server: Started, folder: Path, damage: str) -> None:
    weights = folder / "a3" / "adapter_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config":
        (folder / "a3" / "adapter_config.json").write_text("{")
    elif damage == "other base":
        shutil.rmtree(folder / "a3")
        save_adapter(folder / "a3", 1, hidden_size=32)
    else:
        weights.unlink()
    with pytest.raises(openai.InternalServerError) as failed:
        say(server, "a3")
    assert str(folder) not in str(failed.value), "no path of the server is told"
    assert load(server, "a0", "a3").status_code == 400
    assert server.gateway.registry.find("a0").versioned == "a0@1"  # type: ignore[union-attr]
    assert say(server, "a0")
    (broken,) = [m for m in server.get("/v1/models").json()["data"] if m["id"] == "a3"]
    assert broken["state"] == "broken"
    assert broken["error"]


def test_paths_stay_under_the_folder_of_adapters(server: Started, folder: Path) -> None:
    outside = folder.parent / "outside"
    shutil.copytree(folder / "a0", outside)
    (folder / "link").symlink_to(outside)
    for path in ("../outside", str(outside), "link", ".", "", "a0/..", "nowhere", "a\0b", "x" * 5000):
        answer = load(server, "b", path)
        assert answer.status_code == 400, path
        assert answer.json()["error"]["param"] == "lora_path"
    assert load(server, "b", str(folder / "a1")).status_code == 200
    for name in ("base", "a b", "", "../x", "x@1", "ä", "x" * 200):
        assert load(server, name, "a1").status_code == 400, name
    with pytest.raises(ConfigError, match="without --adapters"):
        inside(None, "a0")


def test_a_folder_of_adapters_that_is_none(tmp_path: Path) -> None:
    from slimtune.serve.registry import folders_of

    with pytest.raises(AdapterFileError, match="no folder"):
        folders_of(tmp_path / "nowhere")
    assert folders_of(tmp_path) == {}


def test_who_leaves_while_an_adapter_is_loaded_leaves_it_known(folder: Path) -> None:
    async def run() -> None:
        backend = EngineBackend(Engine(tiny_model(), tiny_tokenizer(), slots=2))
        registry = Registry(backend)
        adapter = registry.register("a0", folder / "a0")
        await backend.start()

        async def hold() -> None:
            async with registry.use(adapter):
                await asyncio.sleep(60)

        # Cancelled at every point of the way, twice as well.
        for steps in range(12):
            task = asyncio.create_task(hold())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert bool(adapter.loaded) == (adapter.versioned in backend.engine.adapters), steps
            async with registry.use(adapter) as name:
                assert name in backend.engine.adapters
            await registry.unload(adapter)
            adapter = registry.register("a0", folder / "a0")
        await backend.stop()

    asyncio.run(run())


def test_a_load_without_room_is_no_version(folder: Path) -> None:
    size = (folder / "a0" / "adapter_model.safetensors").stat().st_size
    with started(folder, memory=int(1.5 * size), patience=0.05) as server:
        stream = server.client().chat.completions.create(
            model="a0", messages=HELLO, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        answer = load(server, "a1", "a2")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_room")
        assert [adapter.versioned for adapter in server.gateway.registry if adapter.name == "a1"] == ["a1@1"]
        stream.close()


def test_until_a_new_version_has_loaded_its_name_means_the_old_one(server: Started, folder: Path) -> None:
    shutil.rmtree(folder / "a3")
    save_adapter(folder / "a3", 1, hidden_size=32)  # of another base, which shows only when it is loaded
    registry, backend = server.gateway.registry, server.gateway.backend
    meant: list[Any] = []
    load_adapter = backend.load_adapter

    async def watched(name: str, path: Path) -> Any:
        meant.append(registry.find("a0"))
        return await load_adapter(name, path)

    backend.load_adapter = watched  # type: ignore[method-assign]
    assert load(server, "a0", "a2").status_code == 200
    first, second = registry.find("a0@1"), registry.find("a0")
    assert second is not None
    assert second.version == 2
    assert load(server, "a0", "a3").status_code == 400
    assert meant == [first, second]
    assert registry.find("a0") is second


def test_a_version_never_stands_for_other_weights(folder: Path) -> None:
    size = (folder / "a0" / "adapter_model.safetensors").stat().st_size
    with started(folder, memory=int(1.5 * size)) as server:
        first, other = say(server, "a0"), say(server, "a2")
        # Written anew with the same numbers it is the same adapter.
        weights = folder / "a0" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes())
        assert say(server, "a0") == first
        say(server, "a1")
        shutil.rmtree(folder / "a0")
        shutil.copytree(folder / "a2", folder / "a0")
        with pytest.raises(openai.InternalServerError, match="can't be loaded"):
            say(server, "a0")
        assert load(server, "a0", "a0").json()["root"] == "a0@2"
        assert say(server, "a0") == other


def test_no_adapter_is_called_as_the_base_is(folder: Path) -> None:
    registry = Registry(EngineBackend(Engine(tiny_model(), tiny_tokenizer(), slots=1)), reserved="tiny")
    for name in ("tiny", "base"):
        with pytest.raises(ConfigError, match="name of the base"):
            registry.register(name, folder / "a0")


def test_a_prompt_makes_room_for_the_virtual_tokens_of_its_adapter(folder: Path) -> None:
    adapted = get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "soft")
    with started(folder) as server:
        context = server.gateway.backend.context  # type: ignore[attr-defined]
        body = {"prompt": [5] * (context - 20), "temperature": 0, "ignore_eos": True}
        for model, room in (("base", 20), ("soft", 12)):
            answer = server.post("/v1/completions", {"model": model, **body, "max_tokens": room})
            assert answer.json()["usage"]["completion_tokens"] == room
            answer = server.post("/v1/completions", {"model": model, **body, "max_tokens": room + 1})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
        assert "8 virtual tokens" in answer.json()["error"]["message"]
