"""Preference tuning: it learns what is preferred, as TRL does with peft, with one base in memory."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import trl
from rich.console import Console
from transformers import LlamaForCausalLM

import slimtune
from slimtune.adapters import trl_forward
from slimtune.engine import weights
from slimtune.errors import ConfigError, TrainingError
from slimtune.recipe.preference import LOSSES, PreferenceSettings
from slimtune.recipe.training import TrainSettings
from slimtune.train import preferences
from slimtune.train.loop import Outcome, fine_tune
from slimtune.train.preferences import Reward, preference, reward_of
from small_text_model import save_base, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = ["two large lattes", "one tea for maria", "a small flat white", "three espressos to go"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
SHORT = {"generations": 4, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs(count: int = 16) -> datasets.Dataset:
    """The polite answer is preferred."""
    rows = [
        {
            "prompt": said("user", PROMPTS[i % 4]),
            "chosen": said("assistant", f"yes please {i % 3}"),
            "rejected": said("assistant", f"no way {i % 5}"),
        }
        for i in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def judged(count: int = 16) -> datasets.Dataset:
    rows = [
        {
            "prompt": said("user", PROMPTS[i % 4]),
            "completion": said("assistant", "yes please" if i % 2 else "no way"),
            "label": bool(i % 2),
        }
        for i in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def questions(count: int = 16) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": said("user", PROMPTS[i % 4]), "answer": "e"} for i in range(count)])


def adopted(**options: Any) -> Any:
    return slimtune.get_peft_model(tiny_model(), slimtune.LoraConfig(**LORA | options))


def train(
    task: str, model: Any, rows: Any, folder: Path, preferred: PreferenceSettings | None = None, held_out: Any = (),
    resume: bool = False, **changes: Any,
) -> tuple[Outcome, list[dict[str, Any]]]:  # fmt: skip
    settings = TrainSettings(
        **{"learning_rate": 0.01, "max_steps": 6, "batch_size": 4, "warmup": 0, "scheduler": "constant"} | changes
    )
    kind = preference(task, model, TOKENIZER, preferred or PreferenceSettings(), 128)
    with (folder / "screen.txt").open("w") as file:
        screen = Console(file=file, width=250)
        outcome = fine_tune(model, TOKENIZER, rows, settings, folder, screen, held_out, spec=kind, resume=resume)
    return outcome, [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


def test_dpo_raises_the_margin_of_what_is_preferred(tmp_path: Path) -> None:
    model = adopted()
    before = {name: p.clone() for name, p in model.named_parameters() if "deltas" not in name}
    outcome, lines = train("dpo", model, pairs(), tmp_path, held_out=pairs(4), max_steps=8)
    steps = [line for line in lines if "loss" in line]
    assert outcome.steps == len(steps) == 8
    assert steps[0]["rewards/margins"] == 0
    assert steps[-1]["rewards/margins"] > 1
    assert steps[-1]["rewards/accuracies"] == 1
    held_out = next(line for line in reversed(lines) if "eval_loss" in line)
    assert held_out["eval_rewards/margins"] > 1
    assert outcome.tokens > 0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
    assert "forward" not in vars(model)
    assert model.config.use_cache


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_policy_and_reference_score_the_answers_alone(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[tuple[int, bool]] = []
    score = trl_forward.chunked_log_probs

    def counted(hidden: Any, *rest: Any) -> Any:
        scored.append((len(hidden), torch.is_grad_enabled()))
        return score(hidden, *rest)

    monkeypatch.setattr(trl_forward, "chunked_log_probs", counted)
    rows = (pairs if task == "dpo" else judged)(4)
    train(task, adopted(), rows, tmp_path, max_steps=1)
    policy, reference = ([count for count, learns in scored if learns is which] for which in (True, False))
    # KTO scores answers to other prompts too, without a gradient by both.
    assert len(policy) == 1
    assert reference == policy if task == "dpo" else policy[0] in reference


def test_kto_learns_from_single_judgements(tmp_path: Path) -> None:
    outcome, lines = train("kto", adopted(), judged(), tmp_path, max_steps=12)
    chosen = [line["rewards/chosen"] - line["rewards/rejected"] for line in lines if "rewards/chosen" in line]
    assert chosen[-1] > chosen[0] + 0.5
    assert outcome.tokens > 0


def test_orpo_learns_without_a_reference(tmp_path: Path) -> None:
    outcome, lines = train("orpo", adopted(), pairs(), tmp_path, max_steps=12)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    assert outcome.tokens > 0


VOWELS = """
def vowels(completions, prompts, answer):
    assert set(prompts) <= {"two large lattes", "one tea for maria", "a small flat white", "three espressos to go"}
    return [text.count(letter) for text, letter in zip(completions, answer)]
"""


@pytest.fixture(scope="module")
def vowels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward of the user's own, in a file."""
    path = tmp_path_factory.mktemp("rewards") / "judge.py"
    path.write_text(VOWELS)
    return f"{path}:vowels"


@pytest.mark.parametrize("by_engine", [True, False])
def test_grpo_raises_the_reward(by_engine: bool, vowels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers drawn with the weights in another order, as long ones are; by TRL where no engine runs the model."""
    monkeypatch.setattr(weights, "_WORTH_IT", 0)
    if not by_engine:
        monkeypatch.setattr(preferences, "draw", lambda *_, **__: None)
    chosen = PreferenceSettings(reward=vowels, generations=8, max_new_tokens=8)
    model = adopted()
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    outcome, lines = train(
        "grpo", model, questions(), tmp_path, chosen, batch_size=16, max_steps=25, learning_rate=0.02
    )
    frozen = dict(model.named_parameters())
    assert all(torch.equal(frozen[name], parameter) for name, parameter in before.items())
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert len(rewards) == 25
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1
    assert outcome.tokens > 0


def copied(ours: Any) -> Any:
    """The adapter that peft makes, with the very weights of ours."""
    theirs = peft.get_peft_model(tiny_model(), peft.LoraConfig(**LORA))
    tensors = {name: p.detach().clone() for name, p in slimtune.get_peft_model_state_dict(ours).items()}
    peft.set_peft_model_state_dict(theirs, tensors)
    return theirs


def by_trl_with_peft(task: str, ours: Any, rows: Any, folder: Path, steps: int, **options: Any) -> tuple[Any, Any]:
    """TRL's trainer as its documentation has it, on a model of peft."""
    config = getattr(trl, f"{task.upper()}Config")(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=steps, learning_rate=0.01, logging_steps=1,
        lr_scheduler_type="constant", save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        seed=0, max_length=128, gradient_checkpointing=False, optim="adamw_torch_fused", **options,
    )  # fmt: skip
    model = copied(ours)
    trainer = getattr(trl, f"{task.upper()}Trainer")(
        model=model, args=config, train_dataset=rows, processing_class=copy.deepcopy(TOKENIZER)
    )
    trainer.train()
    return model, [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(("task", "rows"), [("dpo", pairs()), ("kto", judged())])
def test_the_steps_are_those_of_trl_with_peft(task: str, rows: Any, tmp_path: Path) -> None:
    ours = adopted()
    theirs, expected = by_trl_with_peft(task, ours, rows, tmp_path / "peft", 4)
    _, lines = train(task, ours, rows, tmp_path, max_steps=4)
    assert len({line["loss"] for line in expected}) == 4
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-4)
    trained = peft.get_peft_model_state_dict(theirs, adapter_name="default")
    for name, tensor in slimtune.get_peft_model_state_dict(ours).items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-3, atol=1e-4)


def bases() -> int:
    gc.collect()
    return sum(isinstance(thing, LlamaForCausalLM) for thing in gc.get_objects())


@pytest.mark.one_in(3)
@pytest.mark.parametrize("batch_size", [4, 8])
def test_answers_to_one_prompt_compute_it_once_and_learn_the_same(batch_size: int, vowels: str, tmp_path: Path) -> None:
    """Policy and reference; in batches of one prompt, and of two, which are padded on the left."""
    runs, computed = [], []
    for share in (False, None):
        model, tokens = adopted(), [0]
        folder = tmp_path / str(share)
        folder.mkdir()

        def count(module: Any, args: Any, tokens: list[int] = tokens) -> None:
            # Drawing is by one token a row, behind a cache.
            tokens[0] += args[0].numel() if args[0].shape[1] > 1 else 0

        model.get_input_embeddings().register_forward_pre_hook(count)
        chosen = PreferenceSettings(reward=vowels, beta=0.1, **SHORT)
        _, lines = train(
            "grpo", model, questions(), folder, chosen, batch_size=batch_size, share_prefixes=share, max_steps=4
        )
        runs.append([line for line in lines if "loss" in line])
        computed.append(tokens[0])
    assert computed[1] < 0.8 * computed[0]
    for padded, shared in zip(*runs, strict=True):
        for name in ("loss", "grad_norm", "reward", "kl"):
            assert shared[name] == pytest.approx(padded[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("task", ["dpo", "kto", "grpo"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_there_is_one_base_in_memory(method: str, task: str, base: Path, tmp_path: Path) -> None:
    """TRL knows where the base came from, and would load it again as the reference."""
    before, seen = bases(), []

    def count(*_: Any) -> None:
        if not seen:
            seen.append(bases())

    model = slimtune.load(str(base))[0]
    if method == "lora":
        model = slimtune.get_peft_model(model, slimtune.LoraConfig(**LORA))
    else:
        model.requires_grad_(True)
    model.model.register_forward_pre_hook(count)
    rows = {"dpo": pairs(4), "kto": judged(4), "grpo": questions(4)}[task]
    compared = task == "grpo" and method == "lora"
    chosen = PreferenceSettings(beta=0.1 if compared else None, **(SHORT if task == "grpo" else {}))
    _, lines = train(task, model, rows, tmp_path, chosen)
    assert seen == [before + 1]
    if task == "grpo":
        assert ("kl" in lines[-1]) == compared
        assert "all answers to a prompt got the same reward" in (tmp_path / "screen.txt").read_text()


def test_what_is_learned_is_what_the_base_lacks(base: Path, tmp_path: Path) -> None:
    """The reference of a new adapter that begins away from the base is the base, and not the adapter's start."""
    model = adopted(init_lora_weights=False)
    _, lines = train("dpo", model, pairs(4), tmp_path, max_steps=1)
    assert lines[0]["rewards/margins"] != 0


def test_the_rate_is_a_tenth_of_the_methods_own(tmp_path: Path) -> None:
    _, lines = train("dpo", adopted(), pairs(4), tmp_path, max_steps=1, learning_rate=None)
    assert lines[0]["learning_rate"] == pytest.approx(slimtune.LoraConfig.learning_rate / 10)


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("task", ["dpo", "orpo", "grpo"])
def test_an_adapter_on_a_quantized_base_learns_in_float32(task: str, base: Path, vowels: str, tmp_path: Path) -> None:
    model = slimtune.load(str(base), dtype="bfloat16", quantize="nf4")[0]
    model = slimtune.get_peft_model(model, slimtune.LoraConfig(**LORA))
    rows = questions(4) if task == "grpo" else pairs(8)
    train(task, model, rows, tmp_path, PreferenceSettings(**(SHORT | {"reward": vowels} if task == "grpo" else {})))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_gradient_checkpointing_changes_no_step(tmp_path: Path) -> None:
    losses = []
    for wanted in (False, True):
        folder = tmp_path / str(wanted)
        folder.mkdir()
        _, lines = train("dpo", adopted(), pairs(), folder, gradient_checkpointing=wanted, max_steps=3)
        losses.append([line["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("dop", {}, "did you mean 'dpo'"),
    ("dpo", {"desirable_weight": 2.0}, "desirable_weight would change nothing with task dpo"),
    ("orpo", {"loss_type": "ipo"}, "loss_type would change nothing"),
    ("dpo", {"reward": "exact-match"}, "reward would change nothing"),
    ("grpo", {"temperature": 0.0}, "temperature must be above 0"),
    ("grpo", {"generations": 1}, "generations must be a whole number of at least 2"),
    ("dpo", {"loss_type": "sigmiod"}, "did you mean 'sigmoid'"),
    ("dpo", {"loss_type": "exo_pair"}, "TRL refuses these settings for dpo: .*exo_pair"),
]


@pytest.mark.parametrize(("task", "options", "complaint"), MISTAKES)
def test_settings_that_cannot_be_are_refused(
    task: str, options: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(task, adopted(), pairs(), tmp_path, PreferenceSettings(**options))


@pytest.mark.parametrize("task", ["dpo", "grpo"])
def test_the_losses_that_can_be_named_are_trls(task: str, base: Path, tmp_path: Path) -> None:
    known = getattr(trl, f"{task.upper()}Config").__dataclass_fields__["loss_type"].metadata["help"]
    assert not [name for name in LOSSES[task] if f"'{name}'" not in known]


def test_groups_that_do_not_fill_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 answers can't hold whole groups of 8"):
        train("grpo", adopted(), questions(), tmp_path)


def test_an_adapter_that_trl_would_pass_by_is_refused(tmp_path: Path) -> None:
    on_head = adopted(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="an adapter on the head would not be trained"):
        train("dpo", on_head, pairs(), tmp_path)
    train("orpo", on_head, pairs(), tmp_path)
    assert on_head.lm_head.deltas["default"].lora_B.any()
    whole = adopted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    before = whole.lm_head.deltas["default"].whole["weight"].detach().clone()
    train("dpo", whole, pairs(), tmp_path)
    assert not torch.equal(whole.lm_head.deltas["default"].whole["weight"], before)
    soft = slimtune.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    for task in ("dpo", "orpo"):
        with pytest.raises(ConfigError, match="what PROMPT_TUNING puts around the whole model"):
            train(task, slimtune.get_peft_model(tiny_model(), soft), pairs(), tmp_path)


def test_rewards_are_found_by_name(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text("def short(completions, **columns):\n    return [-len(text) for text in completions]\n")
    assert reward_of(f"{file}:short")(prompts=["a"], completions=[said("assistant", "abc")]) == [-3.0]
    assert reward_of("exact-match")(prompts=["a", "b"], completions=["x ", "y"], answer=["x", "z"]) == [1.0, 0.0]
    for name, complaint in (
        ("exact_match", "did you mean 'exact-match'"),
        (f"{file}:shrt", "did you mean 'short'"),
        (f"{tmp_path}/jduge.py:short", "did you mean 'judge.py'"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            reward_of(name)
    with pytest.raises(ConfigError, match="needs the field answer"):
        reward_of("exact-match")(prompts=["a"], completions=["x"])


@pytest.mark.parametrize("given", [[1.0], [float("nan")] * 2, "no", None])
def test_a_reward_that_gives_no_numbers_says_so(given: Any) -> None:
    with pytest.raises(TrainingError, match="'odd' gave"):
        Reward("odd", lambda **_: given)(prompts=["a", "b"], completions=["x", "y"])


class BrokenOffError(Exception):
    """Where a test breaks a run off."""


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("task", "rows"), [("dpo", pairs()), ("kto", judged()), ("orpo", pairs()), ("grpo", questions())]
)
def test_a_run_that_broke_off_goes_on_to_the_same_bits(task: str, rows: Any, vowels: str, tmp_path: Path) -> None:
    """Broken off in the third step, on from the checkpoint after the second; with dropout, so that draws count."""
    folders = [tmp_path / "whole", tmp_path / "broken"]
    for folder in folders:
        folder.mkdir()
    whole, broken, resumed = (adopted(lora_dropout=0.2) for _ in range(3))
    chosen = PreferenceSettings(**(SHORT | {"reward": vowels} if task == "grpo" else {}))
    options = {"preferred": chosen, "max_steps": 5, "save_steps": 2, "gradient_accumulation": 2}
    train(task, whole, rows, folders[0], **options)
    steps = 0

    def breaks(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise BrokenOffError

    next(p for name, p in broken.named_parameters() if "lora_B" in name).register_hook(breaks)
    with pytest.raises(BrokenOffError):
        train(task, broken, rows, folders[1], **options)
    train(task, resumed, rows, folders[1], resume=True, **options)
    for name, tensor in slimtune.get_peft_model_state_dict(whole).items():
        assert torch.equal(slimtune.get_peft_model_state_dict(resumed)[name], tensor), name
    logs = [[json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()] for folder in folders]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert [line["tokens"] for line in logs[0]] == [line["tokens"] for line in logs[1]]
