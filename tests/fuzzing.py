"""Damaged and hostile inputs by seed, and what the command line makes of them in processes that may die.

Whatever a stranger's file holds, a command ends as a command does: with an exit code and at most one sentence, within
20 s of the processor and 2 GB of memory. `python tests/fuzzing.py --seconds 600` looks for an input that breaks this,
and prints the family and the seed of each; `python tests/fuzzing.py --family models --seed 7` runs it again.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when torch is imported: a pool of threads would not be there any more in a process that is forked.
os.environ["OMP_NUM_THREADS"] = "1"

import psutil

from damages import VALUES, damaged

SECONDS, BYTES = 20, 2 * 2**30
"""What one input may take of the processor and of memory."""
SILENCE = 90
"""Seconds of the clock in which a process that waits for something, and doesn't compute, has to say something."""

Commands = list[list[str]]


@dataclass(frozen=True)
class Family:
    """Inputs of one kind.

    Attributes:
        make: writes the input that a random generator draws into an empty folder; gives back what to run on it.
    """

    name: str
    make: Callable[[Path, random.Random], Commands]


# -- Damage.

HOSTILE = (*VALUES, 10**12, -(10**12), 2**63, 1e308, float("nan"), float("inf"), "\x00\x1b[31m", "a" * 9999, 0, False)


def draw_damaged(data: bytes, name: str, draw: random.Random) -> bytes | None:
    """A damaged form of the file of this name; None for one that is missing."""
    if name.endswith(".json") and draw.random() < 0.75:
        return json.dumps(_changed(json.loads(data), draw)).encode()
    if name.endswith(".safetensors") and draw.random() < 0.6:
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(_changed(json.loads(data[8 : 8 + length]), draw)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return draw.choice(list(damaged(data, seed=draw.randrange(10**6)).values()))


def _changed(value: Any, draw: random.Random) -> Any:
    """A value of JSON with one to three places in it changed."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return draw.choice(HOSTILE)
        holder, key = draw.choice(places)
        _change(holder, key, draw)
    return value


def _places(value: Any, depth: int = 0) -> Iterable[tuple[Any, Any]]:
    """Where in a value something stands; of long lists and mappings the first few."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys[: 40 if depth == 0 else 12]:
        yield value, key
        if depth < 6:
            yield from _places(value[key], depth + 1)


def _change(holder: Any, key: Any, draw: random.Random) -> None:
    kind = draw.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(("x", key + "s", key.upper(), ""))] = holder.pop(key)
    elif kind == 2:
        others = [where[other] for where, other in _places(holder)]
        holder[key] = json.loads(json.dumps(draw.choice(others)))
    elif kind == 3 and isinstance(holder[key], int | float):
        holder[key] = draw.choice((-1, 0, 1, 2, 3, holder[key] * 2, holder[key] + 1, 10**6, 10**9, 10**18, 1e-9))
    elif kind == 4:
        holder[key] = [holder[key]] * draw.choice((1, 2, 1000))
    else:
        holder[key] = draw.choice(HOSTILE)


# -- Processes.


PRELOADED = (
    "datasets", "slimtune.cli", "slimtune.models.load", "slimtune.pipeline.train", "slimtune.plan.plan",
    "slimtune.evaluate.generation", "slimtune.pipeline.show_data", "transformers.models.llama.modeling_llama",
)  # fmt: skip
"""Imported before processes are forked, for each would take seconds to do it itself."""


def failures(family: Family, seeds: Iterable[int]) -> list[str]:
    """What went wrong with the inputs of these seeds: a line each, with the seed."""
    for module in PRELOADED:
        importlib.import_module(module)
    left, lines = list(seeds), []
    while left:
        done, wrong = _run(family, left)
        lines += wrong
        left = left[done:]
    return lines


def _run(family: Family, seeds: list[int]) -> tuple[int, list[str]]:
    """Run inputs in one process until it dies; gives back how many are done, and what went wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        # Progress bars and logs of libraries; what a command says is caught.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _be_child(family, seeds, writing)
    os.close(writing)
    done, wrong, rest = 0, [], b""
    silent, used = False, 0.0
    while not silent:
        ready, _, _ = select.select([reading], [], [], SILENCE)
        before, used = used, _seconds(child)
        if not ready and used > before + 0.1:
            continue  # on a busy machine it computes, and slowly
        data = os.read(reading, 2**16) if ready else b""
        silent = not data
        if not ready:
            os.kill(child, signal.SIGKILL)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            done += 1
            wrong += [line.decode()] if line else []
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    if status and done < len(seeds):
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
        why = {"SIGPROF": f"more than {SECONDS} s", "SIGKILL": "waits for ever"}.get(how, how)
        wrong.append(f"{family.name}, seed {seeds[done]}: the process ended: {why}")
        done += 1
    return done, wrong


def _seconds(child: int) -> float:
    """What a process and those that it has started have taken of the processor."""
    process, seconds = psutil.Process(child), 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            seconds += sum(each.cpu_times()[:2])
    return seconds


def _be_child(family: Family, seeds: list[int], writing: int) -> None:
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for seed in seeds:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            wrong = check(family, seed)
            os.write(writing, " | ".join(wrong.splitlines())[:3500].encode() + b"\n")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def check(family: Family, seed: int) -> str:
    """What went wrong with the input of this seed, empty if nothing did."""
    from typer.testing import CliRunner

    from slimtune.cli import app

    with tempfile.TemporaryDirectory() as name:
        draw = random.Random(f"{family.name} {seed}")
        for command in family.make(Path(name), draw):
            # Where the command may leave something, and nobody else looks.
            os.chdir(name)
            result = CliRunner().invoke(app, command)
            os.chdir("/")
            what = _wrong(result)
            if what:
                return f"{family.name}, seed {seed}: {' '.join(command)[:300]}: {what}"
    return ""


def _wrong(result: Any) -> str:
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        frames = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-14:]))
        return f"traceback: {type(error).__name__}: {str(error)[:300]} < {where}"
    if result.exit_code not in (0, 1, 2, 3):
        return f"exit code {result.exit_code}"
    if "main memory ran out" in result.stderr:
        return "more than 2 GB of memory"
    # `recipe check` lists its problems on standard output, where a long one takes several lines.
    said = [*result.stderr.splitlines(), *result.stdout.splitlines()]
    if result.exit_code and not any(line.startswith(("slimtune: ", "problem: ", "╰─")) for line in said):
        return f"no sentence: {result.output[-300:]}"
    return ""


# -- Families.


def copied(whole: Path, to: Path) -> Path:
    """A copy of a folder of files."""
    to.mkdir()
    for path in whole.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def damage_one(folder: Path, draw: random.Random, names: tuple[str, ...]) -> str:
    """Damage a file of a folder, or put something in its place that is no file; gives back its name."""
    path = folder / draw.choice(names)
    whole = path.read_bytes()
    path.unlink()
    if draw.random() < 0.03:
        os.mkfifo(path)
    elif draw.random() < 0.03:
        path.symlink_to(draw.choice(("/dev/zero", "/dev/null", "/proc/self/mem", "/", path.name)))
    elif (data := draw_damaged(whole, path.name, draw)) is not None:
        path.write_bytes(data)
    return path.name


def adapters(base: Path, whole: list[Path]) -> Family:
    """Adapter folders of every method, with a damaged file."""

    def make(folder: Path, draw: random.Random) -> Commands:
        adapter = copied(draw.choice(whole), folder / "adapter")
        damage_one(adapter, draw, ("adapter_config.json",) * 3 + ("adapter_model.safetensors",))
        generate = ["generate", str(base), "hello", "--adapter", str(adapter), "--max-new-tokens", "2"]
        return [["info", str(adapter)], generate]

    return Family("adapters", make)


MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def models(whole: Path, data: Path) -> Family:
    """Model folders with a damaged file."""

    def make(folder: Path, draw: random.Random) -> Commands:
        model = copied(whole, folder / "model")
        damage_one(model, draw, MODEL_FILES)
        return [
            ["info", str(model)],
            ["generate", str(model), "hello", "--max-new-tokens", "2"],
            draw.choice((["plan", str(model), str(data)], ["data", "preview", str(data), "--model", str(model)])),
        ]

    return Family("models", make)


PIECES = (
    "{{ messages[0]['content'] }}", "{{ messages }}", "{{ bos_token }}", "{{ x }}", "{{ x.y.z }}", "{{ 1 / 0 }}",
    "{{ 'a' * 10 ** 10 }}", "{{ 10 ** (10 ** 10) }}", "{{ [0] * 10 ** 10 }}", "{{ 'a' | center(10 ** 10) }}",
    "{{ '%10000000000d' % 1 }}", "{{ '{:>9999999999}'.format(1) }}", "{{ range(10 ** 9) | list }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ messages }}{{ messages }}{{ messages }}{{ messages }}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "{{ raise_exception('no') }}", "{{ ''.__class__ }}",
    "{% include 'x' %}", "{% extends 'x' %}", "{{ lipsum(10 ** 6) }}", "{{ messages | sort }}", "{{ {} | join }}",
    "{{ messages | map('upper') | list }}", "{{ 'a'.join(1) }}", "{{ messages.pop() }}", "{{ strftime_now(1) }}",
    "{{ strftime_now('%Y') }}", "{{ messages | tojson(indent=10 ** 9) }}", "{{ dict(1) }}", "{{ cycler() }}",
    "{{ 'x' | indent(10 ** 10) }}", "{{ 'ab' | replace('', 'a' * 10 ** 6) }}", "{{ messages | batch(0) | list }}",
    "{{ 'x' | wordwrap(0) }}", "{{ 1.5 | round(400) }}", "{{ joiner(1)(2) }}", "{{ self.x() }}", "{{ loop }}",
)  # fmt: skip


def templates(whole: Path, shipped: list[str]) -> Family:
    """Chat templates: pieces of hostile ones, and real ones with something changed."""

    def make(folder: Path, draw: random.Random) -> Commands:
        text = draw.choice(shipped)
        if draw.random() < 0.6:
            text = "".join(draw.choice((*PIECES, text)) for _ in range(draw.randint(1, 3)))
        for _ in range(draw.randint(0, 3)):
            at = draw.randrange(len(text) + 1)
            more = draw.choice(("", "{{", "}}", "{% for x in y %}", "{% endif %}", "{#", "\x00", "'", *PIECES))
            text = text[:at] + more + text[at + draw.choice((0, 0, 1, 5, 50)) :]
        if draw.random() < 0.05:
            opening, closing = draw.choice((("{% if 1 %}", "{% endif %}"), ("{% for a in [1] %}", "{% endfor %}")))
            text = opening * 3000 + closing * 3000
        (folder / "template").write_text(text, encoding="utf-8")
        data = folder / "rows.jsonl"
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        data.write_text(json.dumps({"messages": turns}))
        template = ["--chat-template", str(folder / "template")]
        return [["data", "preview", str(data), "--model", str(whole), *template]]

    return Family("templates", make)


def recipes(base: Path, data: Path) -> Family:
    """Recipes with settings changed, and with lines damaged."""
    from slimtune.recipe.shipped import shipped, text_of

    def make(folder: Path, draw: random.Random) -> Commands:
        import yaml

        whole: Any = yaml.safe_load(text_of(draw.choice(sorted(shipped()))))
        whole["model"], whole["output"] = {"name": str(base)}, str(folder / "out")
        whole["data"] = {"train": [str(data)]} | {
            k: v for k, v in whole.get("data", {}).items() if k in ("max_length", "packing")
        }
        path = folder / "recipe.yaml"
        text = yaml.safe_dump(_changed(whole, draw) if draw.random() < 0.8 else whole, allow_unicode=True)
        if draw.random() < 0.3:
            form = draw.choice(list(damaged(text.encode(), seed=draw.randrange(10**6)).values()))
            path.write_bytes(form or b"")
        else:
            path.write_text(text, encoding="utf-8")
        return [["recipe", "check", str(path)]]

    return Family("recipes", make)


def rows(base: Path, whole: list[Any]) -> Family:
    """Files of data in every format, damaged."""

    def make(folder: Path, draw: random.Random) -> Commands:
        count = draw.randint(1, 4)
        values = [json.loads(json.dumps(draw.choice(whole))) for _ in range(count)]
        values = [_changed(value, draw) if draw.random() < 0.7 else value for value in values]
        suffix = draw.choice((".jsonl", ".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet", ".txt", ".tsv"))
        data = _written(values, suffix)
        if draw.random() < 0.4:
            data = draw.choice(list(damaged(data, seed=draw.randrange(10**6)).values())) or b""
        path = folder / f"rows{suffix}"
        if draw.random() < 0.02:
            os.mkfifo(path)
        else:
            path.write_bytes(data)
        return [["data", "preview", str(path), *draw.choice(([], ["--model", str(base)]))]]

    return Family("rows", make)


def _written(values: list[Any], suffix: str) -> bytes:
    lines = "".join(json.dumps(value) + "\n" for value in values).encode()
    if suffix == ".json":
        return json.dumps(values).encode()
    if suffix in (".csv", ".tsv"):
        mark = "\t" if suffix == ".tsv" else ","
        names = sorted({str(name) for value in values if isinstance(value, dict) for name in value})
        table = [names, *([str(value.get(n, "")) for n in names] for value in values if isinstance(value, dict))]
        return "\n".join(mark.join(row) for row in table).encode("utf-8", "replace")
    if suffix == ".parquet":
        return _parquet(values) or lines
    return gzip.compress(lines) if suffix.endswith(".gz") else lines


def _parquet(values: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    try:
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), sink)
        return sink.getvalue().to_pybytes()
    except (pyarrow.ArrowException, AttributeError, OverflowError, TypeError):
        return b""


ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "train": True}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "be kind"},
    {"instruction": "say it", "input": "x", "output": "y", "history": [["a", "b"]]},
    {"prompt": "hi", "completion": "hello"},
    {"prompt": [{"role": "user", "content": "hi"}], "chosen": "good", "rejected": "bad"},
    {"text": "some text", "label": "good"},
    {"tokens": ["some", "text"], "tags": ["O", "B-X"]},
    {"question": "1 + 1", "answer": "2"},
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "name": "f", "content": "1"},
            {"role": "assistant", "content": "done"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
]


def families(folder: Path) -> list[Family]:
    """All families, with the whole inputs that they damage written into a folder."""
    import slimtune
    from slimtune.data.chat_template import named_templates
    from small_text_model import CHATML, save_base, tiny_model, write_lines

    base = save_base(folder / "base")
    tiny_model().generation_config.__class__(
        max_length=40, do_sample=True, temperature=0.7, top_k=20, top_p=0.9, eos_token_id=[2], pad_token_id=2
    ).save_pretrained(base)
    data = write_lines(folder / "rows.jsonl", *ROWS[:1] * 4)
    made = []
    for number, config in enumerate(
        [
            slimtune.LoraConfig(r=2, bias="lora_only", rank_pattern={"q_proj": 1}, task_type="CAUSAL_LM"),
            slimtune.LoraConfig(r=2, use_dora=True, modules_to_save=["lm_head"], trainable_token_indices=[3, 5]),
            slimtune.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0], init_lora_weights="pissa"),
            slimtune.AdaLoraConfig(init_r=3, target_r=2, total_step=10),
            slimtune.VeraConfig(r=4),
            slimtune.LoHaConfig(r=2),
            slimtune.LoKrConfig(r=2),
            slimtune.IA3Config(),
            slimtune.BottleneckConfig(bottleneck_size=2),
            slimtune.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            slimtune.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            slimtune.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            slimtune.TrainableTokensConfig(token_indices=[1, 2]),
            slimtune.LNTuningConfig(),
        ]
    ):
        made.append(folder / f"adapter-{number}")
        slimtune.get_peft_model(tiny_model(), config).save_pretrained(made[-1])
        (made[-1] / "README.md").unlink(missing_ok=True)
    shipped = [CHATML, *(path.read_text(encoding="utf-8") for path in named_templates().values())]
    return [
        adapters(base, made),
        models(base, data),
        templates(base, shipped),
        recipes(base, data),
        rows(base, ROWS),
    ]


def main() -> None:
    """Look for inputs that break something until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long to look")
    parser.add_argument("--family", help="this one alone")
    parser.add_argument("--seed", type=int, help="the first seed; alone with --count")
    parser.add_argument("--count", type=int, default=25, help="seeds in one process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        chosen = [family for family in families(Path(name)) if options.family in (None, family.name)]
        first = random.randrange(10**6) if options.seed is None else options.seed
        end, tried, wrong = time.monotonic() + options.seconds, 0, 0
        while True:
            for family in chosen:
                lines = failures(family, range(first, first + options.count))
                tried, wrong = tried + options.count, wrong + len(lines)
                for line in lines:
                    print(line, flush=True)
            first += options.count
            if time.monotonic() > end or options.seed is not None:
                break
        print(f"{tried} inputs up to seed {first}, {wrong} of them failed")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
