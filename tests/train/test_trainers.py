"""transformers' Trainer and trl's SFTTrainer train an adopted model unchanged, and their checkpoints are adapters."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import slimtune
from slimtune.adapters import trl_forward
from slimtune.errors import ConfigError
from tensors import adapter_tensors, assert_all_near, assert_near, assert_same, copies, predict, randomize
from zoo import BERT, LLAMA, TIED_LLAMA, VOCABULARY, Specimen, word_tokenizer

WEIGHTS = "adapter_model.safetensors"


class Rows(torch.utils.data.Dataset):
    """Enough rows for a few steps, the same at each call."""

    def __init__(self, specimen: Specimen, rows: int = 16) -> None:
        generator = torch.Generator().manual_seed(4)
        self.ids = torch.randint(4, VOCABULARY, (rows, 8), generator=generator)
        self.labels = self.ids if specimen is LLAMA else torch.randint(0, 3, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def tuned(library: ModuleType, specimen: Specimen) -> Any:
    model = library.get_peft_model(specimen.model(), library.LoraConfig(r=4, **specimen.options()))
    return randomize(library, model)


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    return transformers.TrainingArguments(**{**defaults, **changes})


def trainer(model: Any, specimen: Specimen, folder: Path, **changes: Any) -> transformers.Trainer:
    return transformers.Trainer(model=model, args=arguments(folder, **changes), train_dataset=Rows(specimen))


def losses(done: transformers.Trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in done.state.log_history if "loss" in entry])


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}], ids=["plain", "acc", "gc"]
)
@pytest.mark.parametrize("specimen", [LLAMA, BERT], ids=lambda specimen: specimen.name)
def test_the_trainer_takes_the_steps_that_it_takes_with_peft(
    specimen: Specimen, changes: dict[str, Any], tmp_path: Path
) -> None:
    histories = []
    for library in (slimtune, peft):
        done = trainer(tuned(library, specimen), specimen, tmp_path / library.__name__, **changes)
        done.train()
        histories.append(losses(done))
    assert len(set(histories[0].tolist())) == 4
    assert_near(histories[0], histories[1], 2e-5)


def test_a_checkpoint_holds_the_adapter_alone_and_resumes(tmp_path: Path) -> None:
    whole = trainer(tuned(slimtune, LLAMA), LLAMA, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    expected = copies(adapter_tensors(slimtune, whole.model))
    checkpoint = tmp_path / "checkpoint-2"
    files = {path.name for path in checkpoint.iterdir()}
    assert {WEIGHTS, "adapter_config.json"} <= files
    assert not {"pytorch_model.bin", "config.json"} & files
    # The Trainer looks for a model's own name on resuming: a second name of the adapter, not a second file.
    assert (checkpoint / "model.safetensors").samefile(checkpoint / WEIGHTS)
    size = sum(tensor.numel() * 4 for tensor in expected.values())
    assert (checkpoint / WEIGHTS).stat().st_size < size + 8192
    assert peft.PeftConfig.from_pretrained(str(checkpoint)).r == 4

    resumed = trainer(tuned(slimtune, LLAMA), LLAMA, tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert_all_near(copies(adapter_tensors(slimtune, resumed.model)), expected, 1e-6)
    assert len(losses(resumed)) == 4, "the first two from the checkpoint's history"


def test_save_model_writes_an_adapter(tmp_path: Path) -> None:
    done = trainer(tuned(slimtune, LLAMA), LLAMA, tmp_path)
    done.train()
    done.save_model(str(tmp_path / "final"))
    reread = peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path / "final")
    assert_same(copies(adapter_tensors(peft, reread)), copies(adapter_tensors(slimtune, done.model)))
    assert_near(predict(done.model, LLAMA.batch()), predict(reread, LLAMA.batch()))


def test_the_best_adapter_is_loaded_at_the_end(tmp_path: Path) -> None:
    changes = {
        "max_steps": 3,
        "learning_rate": 0.5,  # so that it gets worse
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    model = tuned(slimtune, LLAMA)
    args = arguments(tmp_path, **changes)
    done = transformers.Trainer(model=model, args=args, train_dataset=Rows(LLAMA), eval_dataset=Rows(LLAMA, 4))
    done.train()
    best = Path(str(done.state.best_model_checkpoint))
    stored = load_file(best / WEIGHTS)
    assert_same(copies(adapter_tensors(slimtune, done.model)), stored)
    evaluated = [entry["eval_loss"] for entry in done.state.log_history if "eval_loss" in entry]
    assert len(set(evaluated)) == 3
    assert best.name == f"checkpoint-{evaluated.index(min(evaluated)) + 1}"


def test_evaluation_gives_logits_to_metrics(tmp_path: Path) -> None:
    done = trainer(tuned(slimtune, BERT), BERT, tmp_path)
    prediction = done.predict(Rows(BERT, 6))
    assert prediction.predictions.shape == (6, 3)
    causal = trainer(tuned(slimtune, LLAMA), LLAMA, tmp_path).predict(Rows(LLAMA, 6))
    assert causal.predictions.shape == (6, 8, VOCABULARY)


def test_an_adapter_loaded_for_inference_is_not_trained_silently(tmp_path: Path) -> None:
    tuned(slimtune, LLAMA).save_pretrained(tmp_path / "adapter")
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path / "adapter")
    before = copies(adapter_tensors(slimtune, model))
    with pytest.raises((ValueError, RuntimeError)):
        trainer(model, LLAMA, tmp_path).train()
    assert_same(copies(adapter_tensors(slimtune, model)), before)


@pytest.fixture
def sft_rows() -> Any:
    import datasets

    rows = Rows(LLAMA)
    return datasets.Dataset.from_dict({"input_ids": rows.ids.tolist()})


def sft_trainer(model: Any, folder: Path, rows: Any, **changes: Any) -> Any:
    import trl

    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 5,
        "max_length": 16,
    }
    config = trl.SFTConfig(**{**defaults, **changes})
    return trl.SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=word_tokenizer())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_takes_the_steps_that_it_takes_with_peft(
    gradient_checkpointing: bool, sft_rows: Any, tmp_path: Path
) -> None:
    histories = []
    for library in (slimtune, peft):
        done = sft_trainer(
            tuned(library, LLAMA), tmp_path / library.__name__, sft_rows, gradient_checkpointing=gradient_checkpointing
        )
        done.train()
        histories.append(losses(done))
        done.save_model(str(tmp_path / library.__name__))
    assert len(histories[0]) == 3
    assert_near(histories[0], histories[1], 2e-5)
    saved = [load_file(tmp_path / library.__name__ / WEIGHTS) for library in (slimtune, peft)]
    assert sorted(saved[0]) == sorted(saved[1])
    config = json.loads((tmp_path / "slimtune" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_sft_shares_what_rows_begin_with(tmp_path: Path) -> None:
    """As on the page on speed: the losses are the same, TRL's entropy and accuracy too."""
    import datasets

    ids = torch.randint(4, VOCABULARY, (16, 14), generator=torch.Generator().manual_seed(4))
    ids[:, :10] = ids[0, :10].clone()
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    histories = []
    for shares in (False, True):
        done = sft_trainer(tuned(slimtune, LLAMA), tmp_path / str(shares), rows)
        model = done.model
        slimtune.check_shares(model)
        with slimtune.shared_prefixes(model) if shares else nullcontext() as tokens:
            done.train()
        if tokens is not None:
            assert tokens.ratio == pytest.approx(4 * 14 / (10 + 4 * 4))
        names = ("loss", "entropy", "mean_token_accuracy", "grad_norm")
        histories.append([[entry[name] for name in names] for entry in done.state.log_history if "loss" in entry])
    assert len(histories[0]) == 3
    torch.testing.assert_close(torch.tensor(histories[1]), torch.tensor(histories[0]), rtol=1e-4, atol=1e-5)


SOFT: dict[str, Any] = {
    "prompt": lambda library: library.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda library: library.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "head": lambda library: library.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", SOFT)
def test_sft_trains_what_stands_around_the_model_and_a_whole_head(kind: str, sft_rows: Any, tmp_path: Path) -> None:
    """TRL's own forward runs the layers past the model's: as in peft, nothing of an adapter is left out."""
    histories, tensors = [], []
    for library in (slimtune, peft):
        model = randomize(library, library.get_peft_model(LLAMA.model(), SOFT[kind](library)))
        done = sft_trainer(model, tmp_path / library.__name__, sft_rows, gradient_checkpointing=False)
        done.train()
        histories.append(losses(done))
        tensors.append(adapter_tensors(library, model))
    assert_near(histories[0], histories[1], 2e-5)
    assert_all_near(*tensors, 1e-4)


FUSED: dict[str, tuple[Specimen, Any]] = {
    "prompt": (LLAMA, lambda: slimtune.PromptTuningConfig(num_virtual_tokens=3)),
    "p-tuning": (LLAMA, lambda: slimtune.PromptEncoderConfig(num_virtual_tokens=3)),
    "prefix": (LLAMA, lambda: slimtune.PrefixTuningConfig(num_virtual_tokens=3)),
    "lora": (LLAMA, lambda: slimtune.LoraConfig(r=4, target_modules=["q_proj"])),
    "whole-head": (LLAMA, lambda: slimtune.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "tokens-at-both-ends": (TIED_LLAMA, lambda: slimtune.TrainableTokensConfig(token_indices=[5, 9, 40])),
    "last-layer": (LLAMA, slimtune.LastLayerConfig),
    "full-head": (LLAMA, lambda: slimtune.FullConfig(target_modules=["lm_head"])),
}


@pytest.mark.parametrize("kind", FUSED)
def test_trl_s_head_gives_the_model_s_own_loss_and_gradients(kind: str) -> None:
    from trl.trainer.utils import add_fused_lm_head

    specimen, config = FUSED[kind]
    model = randomize(slimtune, slimtune.get_peft_model(specimen.model(), config())).train()
    found = []
    for options in ({}, {}, {"fused_lm_head": True}):
        if len(found) == 1:
            add_fused_lm_head(model)
        model.zero_grad()
        loss = model(**specimen.batch(), **options).loss
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        found.append({"loss": loss.detach(), **gradients})
    for other in found[1:]:
        assert_all_near(other, found[0], 1e-5)
    ids = specimen.batch()["input_ids"]
    assert model.eval().generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2).shape == (2, 9)


Scored = list[tuple[str, int]]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Scored:
    """Whose kernel made log-probabilities, and of how many tokens."""
    from trl.trainer import utils

    calls: Scored = []

    def counted(whose: str, score: Any) -> Any:
        def counting(hidden: Any, *rest: Any) -> Any:
            calls.append((whose, hidden.numel() // hidden.shape[-1]))
            return score(hidden, *rest)

        return counting

    theirs = utils._ChunkedLogProbFunction
    monkeypatch.setattr(theirs, "apply", counted("trl", theirs.apply))
    monkeypatch.setattr(trl_forward, "chunked_log_probs", counted("slimtune", trl_forward.chunked_log_probs))
    return calls


PER_TOKEN = ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")


def by_trl_and_by_us(
    model: Any, given: dict[str, Any], scored: Scored, monkeypatch: pytest.MonkeyPatch, **head: Any
) -> int:
    """TRL's forward as it is and as adopted models run it give the same; gives back how many tokens TRL scores."""
    from trl.trainer import utils

    found = []
    with monkeypatch.context() as patched:
        patched.setattr("slimtune.adapters.model.on_learned_tokens", lambda model, forward: forward)
        for _ in range(2):
            utils.add_fused_lm_head(model, outputs=PER_TOKEN, **head)
            model.zero_grad()
            output = model(**given, fused_lm_head=True)
            (output.log_probs.sum() + 0.1 * output.entropy.sum()).backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            tensors = {name: getattr(output, name).float() for name in ("loss", "label_mask", *PER_TOKEN)}
            found.append({n: v.detach() for n, v in (tensors | gradients).items()})
            patched.undo()
            for name in ("forward", "instance_forward"):
                vars(model).pop(name, None)
    assert_all_near(found[1], found[0], 1e-5)
    assert len(scored) == 2
    whose, positions = scored[0]
    assert whose == "trl"
    return positions


@pytest.mark.parametrize(
    ("kind", "shifted"),
    # A prompt makes room in labels, and not in labels that are shifted already.
    [(kind, shifted) for kind in FUSED for shifted in (False, True) if not (shifted and kind.startswith("p"))],
)
def test_trl_s_head_scores_the_learned_tokens_alone(
    shifted: bool, kind: str, scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    specimen, config = FUSED[kind]
    given = {name: value for name, value in specimen.batch().items() if name != "labels"}
    labels = specimen.batch()["labels"].clone()
    labels[:, :4] = -100
    shift_labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    given |= {"shift_labels": shift_labels} if shifted else {"labels": labels}
    model = randomize(slimtune, slimtune.get_peft_model(specimen.model(), config())).train()
    positions = by_trl_and_by_us(model, given, scored, monkeypatch)
    learned = int((labels[:, 1:] != -100).sum())
    # A head that learns takes a gradient, which TRL's kernel alone has.
    assert scored[1] == ("trl" if kind in LEARNED_HEADS else "slimtune", learned)
    assert learned < positions


LEARNED_HEADS = ("whole-head", "tokens-at-both-ends", "last-layer", "full-head")


@pytest.mark.parametrize(
    ("config", "head", "whose"),
    [
        ({}, {"temperature": 0.7}, "slimtune"),
        ({"logit_scale": 0.5}, {"temperature": 0.7}, "slimtune"),
        ({"final_logit_softcapping": 2.0}, {}, "trl"),
        ({"logits_scaling": 4.0}, {"cast_lm_head_to_fp32": True}, "slimtune"),
    ],
)
def test_trl_s_head_gives_the_same_of_logits_that_are_scaled_or_capped(
    config: dict[str, float], head: dict[str, Any], whose: str, scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned(slimtune, LLAMA).train()
    for name, value in config.items():
        setattr(model.config, name, value)
    by_trl_and_by_us(model, LLAMA.batch(), scored, monkeypatch, **head)
    assert scored[1][0] == whose


def test_an_adapter_on_the_head_that_trl_would_pass_by_is_refused(sft_rows: Any, tmp_path: Path) -> None:
    config = slimtune.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="an adapter on the head would not be trained; leave the head out") as told:
        sft_trainer(slimtune.get_peft_model(LLAMA.model(), config), tmp_path, sft_rows)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", ["lora", "whole-head", "prompt"])
def test_after_sft_the_model_goes_on_without_its_adapter(kind: str, sft_rows: Any, tmp_path: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), FUSED[kind][1]())
    done = sft_trainer(model, tmp_path, sft_rows)
    done.train()
    tuned_logits = predict(model, LLAMA.batch())
    plain = model.unload() if kind == "prompt" else model.merge_and_unload()
    expected = predict(LLAMA.model(), LLAMA.batch()) if kind == "prompt" else tuned_logits
    assert_near(predict(plain, LLAMA.batch()), expected)
    assert plain.generate(input_ids=LLAMA.batch()["input_ids"], max_new_tokens=2, min_new_tokens=2).shape == (2, 9)


def test_packed_rows_are_refused_under_a_prompt(sft_rows: Any, tmp_path: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.PromptTuningConfig(num_virtual_tokens=3))
    done = sft_trainer(model, tmp_path, sft_rows, packing=True)
    with pytest.raises(ConfigError, match="only the first would have them; leave packing"):
        done.train()


def test_what_asks_for_peft_s_own_class_says_so_and_takes_the_model(sft_rows: Any, tmp_path: Path) -> None:
    """The errors are transformers' and TRL's; docs/peft.md quotes them beside the way out, which is taken here."""
    import trl

    config = slimtune.LoraConfig(r=4, target_modules=["q_proj"])
    page = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")
    with pytest.raises(TypeError, match="adapter_config should be an instance of PeftConfig"):
        LLAMA.model().add_adapter(config)
    with pytest.raises((TypeError, ValueError), match=r"must be a `peft\.PeftConfig` instance"):
        trl.SFTTrainer(
            model=LLAMA.model(), args=trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=sft_rows,
            processing_class=word_tokenizer(), peft_config=config,
        )  # fmt: skip
    for message in ("adapter_config should be an instance of PeftConfig", "must be a `peft.PeftConfig` instance"):
        assert message in page
    model = slimtune.get_peft_model(LLAMA.model(), config)
    model.add_adapter("other", config)
    assert [*model.peft_config] == ["default", "other"]
    model.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
    plain = LLAMA.model()
    plain.load_adapter(str(tmp_path / "saved"))
    assert_near(predict(plain, LLAMA.batch()), predict(model, LLAMA.batch()))
