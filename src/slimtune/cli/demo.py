"""`slimtune demo`: the whole way on a real model, from a base that can't to a merged model that can."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli.options import Output, Overwrite
from slimtune.console.libraries import importing
from slimtune.console.screen import open_screen, say
from slimtune.errors import TrainingError, counted

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.data.demo_orders import Example
    from slimtune.evaluate.exact_match import ExactMatch

BASE = "smollm2-135m-instruct"
MAX_NEW_TOKENS = 40
GOAL = 0.9


def demo(
    output: Output = Path("demo-orders"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 16 examples.")] = 40,
    held_out: Annotated[int, typer.Option(min=2, help="Held-out examples to score on.")] = 100,
    quick: Annotated[bool, typer.Option("--quick", help="A short run that shows that everything works.")] = False,
    seed: Annotated[int, typer.Option(help="Of the data and the weights.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Teach SmolLM2-135M to turn spoken orders into JSON: score, tune, save, reload, merge.

    Exit code 1 if the reloaded and the merged model don't answer as the tuned one, or too few answers are right.

    Example: slimtune demo --output demo-orders
    """
    from slimtune.storage.atomic import refuse_existing

    refuse_existing(output, overwrite)
    if quick:
        # Smaller numbers that were typed stay.
        steps, held_out = min(steps, 12), min(held_out, 24)
    if not Demo(open_screen(works_on=True), output, steps, held_out, seed, is_quick=quick).run():
        raise typer.Exit(1)


@dataclass
class Demo:
    """One run; `results` becomes results.json."""

    screen: Console
    output: Path
    steps: int
    held_out: int
    seed: int
    is_quick: bool
    results: dict[str, Any] = field(default_factory=dict)

    def run(self) -> bool:
        """The whole way; False if it ends somewhere else than it should."""
        from slimtune.data.demo_orders import make_orders

        began = time.monotonic()
        train, held_out = make_orders(640, self.held_out, self.seed)
        model, tokenizer = self._load()
        base = self._score_base(model, tokenizer, train, held_out)
        tuned = self._tune(model, tokenizer, train, held_out, base)
        reloaded = self._answers_of_a_fresh_process(held_out)
        merged = self._merge(model, tokenizer, held_out)
        return self._conclude(tuned, reloaded, merged, time.monotonic() - began)

    def _load(self) -> tuple[Any, Any]:
        with importing():
            from slimtune.models.device import native_dtype
            from slimtune.models.load import LoadOptions, load_model

        with self._step("Load SmolLM2-135M-Instruct (unpacked at the first use)"):
            model, tokenizer = load_model(BASE, "text", LoadOptions(native_dtype()))
            self.screen.print(f"{model.num_parameters():,} parameters in {model.dtype}, on {model.device}")
        return model, tokenizer

    def _score_base(self, model: Any, tokenizer: Any, train: list[Example], held_out: list[Example]) -> ExactMatch:
        from slimtune.data.demo_orders import few_shot

        with self._step(f"Score the untuned model on {len(held_out)} held-out orders"):
            zero = self._ask(model, tokenizer, held_out)
            self._tell("zero_shot", "without examples", zero)
            # Prompting with examples is what one would do without training; it costs its time at every question.
            some = held_out[: max(8, len(held_out) // 4)]
            shots = [few_shot(example, train[:4]) for example in some]
            self._tell("four_shot", "with four examples in the prompt", self._ask(model, tokenizer, some, shots))
        return zero

    def _tune(
        self, model: Any, tokenizer: Any, train: list[Example], held_out: list[Example], base: ExactMatch
    ) -> ExactMatch:
        with importing():
            from slimtune.data.tasks.registry import read
            from slimtune.pipeline.train import adopt, tune
            from slimtune.recipe.recipe import Recipe
            from slimtune.train.run_folder import run_folder

        rows = self.output / "train.jsonl"
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text("".join(json.dumps({"messages": e.messages()}) + "\n" for e in train), encoding="utf-8")
        training = {"learning_rate": 1e-3, "max_steps": self.steps, "batch_size": 16, "warmup": 0.1, "seed": self.seed}
        recipe = Recipe.of({
            "model": {"name": BASE, "dtype": _native()},
            "data": {"train": str(rows), "max_length": 256},
            "method": {"name": "lora", "target_modules": "all-linear"},
            "training": training,
            "output": str(self.adapter),
        })  # fmt: skip
        with self._step("Tune with LoRA"):
            adopt(model, recipe.method.config(), self.seed)
            data = read(recipe.data, recipe.task, self.seed)
            with run_folder(self.adapter, recipe.to_dict(), overwrite=True, resume=False) as folder:
                outcome = tune(self.screen, model, tokenizer, data, recipe, folder)
            self.results |= {"train_seconds": outcome.seconds, "tokens_per_second": outcome.tokens_per_second}
        with self._step("Score the tuned model on the same orders"):
            tuned = self._ask(model, tokenizer, held_out)
            self._tell("tuned", "without examples", tuned)
            self._show(held_out, base, tuned)
        return tuned

    def _answers_of_a_fresh_process(self, held_out: list[Example]) -> list[str]:
        questions = self.output / "held_out.jsonl"
        questions.write_text("".join(json.dumps({"messages": e.question()}) + "\n" for e in held_out))
        options = ["--max-new-tokens", str(MAX_NEW_TOKENS), "--dtype", _native(), "--json"]
        command = ["generate", BASE, "--adapter", str(self.adapter), "--input", str(questions), *options]
        with self._step("Reload the adapter in a fresh process"):
            size = sum(path.stat().st_size for path in self.adapter.glob("adapter_*"))
            self.screen.print(f"the adapter on disk: {size / 1e6:.0f} MB\n$ slimtune {' '.join(command)}", markup=False)
            done = subprocess.run([sys.executable, "-m", "slimtune", *command], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise TrainingError(f"the fresh process ended with exit code {done.returncode}; see what it printed above")
        return [json.loads(line)["answer"] for line in done.stdout.splitlines()]

    def _merge(self, model: Any, tokenizer: Any, held_out: list[Example]) -> list[str]:
        from slimtune.models.export import merge_to_folder
        from slimtune.models.load import load_model

        with self._step("Merge into a plain model, written and read again"):
            report = merge_to_folder(model, tokenizer, self.output / "merged", max_kl=0.05, overwrite=True)
            self.screen.print(f"what the adapter changed: {report.adapter}\nwhat merging lost: {report.reloaded}")
            self.results["merge"] = report.to_dict()
            merged, _ = load_model(self.output / "merged", "text")
            return self._ask(merged, tokenizer, held_out).answers

    def _conclude(self, tuned: ExactMatch, reloaded: list[str], merged: list[str], seconds: float) -> bool:
        from rich.markup import escape

        from slimtune.data.demo_orders import INSTRUCTION

        total = len(tuned.answers)
        alike = {
            "reloaded": sum(a == b for a, b in zip(tuned.answers, reloaded, strict=True)),
            "merged": sum(a == b for a, b in zip(tuned.answers, merged, strict=True)),
        }
        self.screen.rule("Result")
        for name, count in alike.items():
            self.screen.print(f"{name:<9} answers like the tuned model: {count} of {total}")
        # Merging rounds to the base's type, after which a tie between two tokens may fall the other way.
        is_alike = alike["reloaded"] == total and alike["merged"] >= 0.9 * total
        is_good = tuned.share >= (0.3 if self.is_quick else GOAL)
        self.results |= {"alike": alike, "seconds": seconds, "steps": self.steps, "passed": is_alike and is_good}
        (self.output / "results.json").write_text(json.dumps(self.results, indent=2) + "\n")
        verdict = "[bold green]done[/]" if is_alike and is_good else "[bold red]not as it should be[/]"
        self.screen.print(f"{verdict} in {seconds:.0f} s; everything is in {escape(str(self.output))}")
        self.screen.print(
            f'try it:  slimtune chat {BASE} --adapter {self.adapter} --system "{INSTRUCTION}"', markup=False
        )
        return is_alike and is_good

    @property
    def adapter(self) -> Path:
        """Where the adapter is written."""
        return self.output / "adapter"

    def _ask(self, model: Any, tokenizer: Any, examples: list[Example], conversations: Any = None) -> ExactMatch:
        from slimtune.evaluate.exact_match import exact_match

        questions = conversations or [example.question() for example in examples]
        return exact_match(model, tokenizer, examples, questions, MAX_NEW_TOKENS)

    def _tell(self, key: str, how: str, score: ExactMatch) -> None:
        self.results[key] = {"exact_match": score.share, "right": score.right, "of": len(score.answers)}
        self.screen.print(f"{how}: [bold]{score}[/] exactly right")

    def _show(self, held_out: list[Example], base: ExactMatch, tuned: ExactMatch) -> None:
        from rich.table import Table

        table = Table("spoken", "before", "after", "", box=None, padding=(0, 2, 1, 0))
        for example, before, after in list(zip(held_out, base.answers, tuned.answers, strict=True))[:4]:
            mark = "[green]right[/]" if example.is_answered_by(after) else "[red]wrong[/]"
            table.add_row(example.sentence, _short(before), _short(after), mark)
        self.screen.print(table, soft_wrap=False)

    @contextmanager
    def _step(self, title: str) -> Iterator[None]:
        self.screen.rule(f"[bold]{title}[/]", align="left")
        began = time.monotonic()
        yield
        self.screen.print(f"[dim]{time.monotonic() - began:.0f} s[/]")


def _short(text: str, limit: int = 90) -> str:
    from rich.markup import escape

    line = " ".join(text.split())
    return escape(line if len(line) <= limit else line[:limit] + " ...")


def _native() -> str:
    from slimtune.models.device import native_dtype

    return native_dtype()


def demo_data(
    output: Output,
    train: Annotated[int, typer.Option(min=1, help="Training examples.")] = 640,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out examples.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed writes the same examples.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write the demo's task (a spoken order turned into JSON) as train.jsonl and held_out.jsonl.

    Example: slimtune demo-data --output orders && slimtune train smollm2-135m-instruct orders/train.jsonl -o tuned
    """
    from slimtune.data.demo_orders import make_orders, write_jsonl
    from slimtune.storage.atomic import staged

    parts = dict(zip(("train.jsonl", "held_out.jsonl"), make_orders(train, held_out, seed), strict=True))
    with staged(output, overwrite) as folder:
        for name, examples in parts.items():
            write_jsonl(folder / name, examples)
    for name, examples in parts.items():
        say(f"{output / name}: {counted(len(examples), 'example')}")
