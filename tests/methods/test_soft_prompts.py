"""What holds for virtual tokens whatever is around them: pads, caches, beams, checkpoints, other adapters."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import slimtune
from slimtune.errors import ConfigError, MergeError
from tensors import adapter_tensors, assert_all_near, assert_near, assert_same, loss_of, predict, randomize, trainable
from zoo import (
    BERT,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    LLAMA,
    LLAMA_LINEARS,
    QWEN2,
    SPECIMENS,
    T5,
    VOCABULARY,
    Specimen,
    token_ids,
    word_tokenizer,
)

CONFIGS: dict[str, Any] = {
    "prompt": lambda: slimtune.PromptTuningConfig(num_virtual_tokens=5),
    "p-mlp": lambda: slimtune.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=24),
    "p-lstm": lambda: slimtune.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_reparameterization_type="LSTM", encoder_dropout=0.3
    ),
    "prefix": lambda: slimtune.PrefixTuningConfig(num_virtual_tokens=5),
    "projected-prefix": lambda: slimtune.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True),
}
KINDS = ["prompt", "p-mlp", "prefix"]
CAUSAL = [LLAMA, QWEN2, GPT2, GPT_NEOX, GEMMA3]
TEXTUAL = [specimen for specimen in SPECIMENS if specimen.name not in ("vit", "mixture")]
each_causal = pytest.mark.parametrize("specimen", CAUSAL, ids=lambda specimen: specimen.name)
each_kind = pytest.mark.parametrize("kind", KINDS)
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def tuned(kind: str, specimen: Specimen) -> Any:
    torch.manual_seed(4)
    return randomize(slimtune, slimtune.get_peft_model(specimen.model(), CONFIGS[kind]())).eval()


def padded(ids: Tensor, pads: int, left: bool = True) -> dict[str, Tensor]:
    """The first row with pads, the second without."""
    ones, rows = torch.ones_like(ids), ids.clone()
    cut = slice(None, pads) if left else slice(-pads, None)
    text = rows[0, :-pads].clone()
    rows[0] = torch.cat([torch.zeros(pads, dtype=torch.long), text] if left else [text, torch.zeros(pads).long()])
    ones[0, cut] = 0
    return {"input_ids": rows, "attention_mask": ones}


@each_causal
@each_kind
def test_a_padded_row_gives_what_it_gives_alone(kind: str, specimen: Specimen) -> None:
    model, batch = tuned(kind, specimen), padded(token_ids(length=9), pads=3)
    alone = {"input_ids": batch["input_ids"][:1, 3:]}
    assert_near(predict(model, batch)[0, -6:], predict(model, alone)[0, -6:])
    # Pads push a prefix out of Gemma's window, which is refused; tokens in front of the text have pads before them.
    is_short = specimen is GEMMA3 and kind == "prefix"
    options = {**GREEDY, "max_new_tokens": 2, "min_new_tokens": 2} if is_short else GREEDY
    together = model.generate(**batch, **options)
    assert torch.equal(
        together[0, 9:], model.generate(**alone, attention_mask=torch.ones(1, 6).long(), **options)[0, 6:]
    )


@pytest.mark.parametrize("kind", ["prompt", "p-mlp", "p-lstm"])
def test_pads_take_no_place_in_a_window(kind: str) -> None:
    """Of 16 tokens, in rows of more than that: without a cache, from one, and in the gradients."""
    model = tuned(kind, GEMMA3)
    batch, labels = padded(token_ids(length=18), pads=8), torch.full((2, 18), -100)
    alone = {"input_ids": batch["input_ids"][:1, 8:]}
    assert_near(predict(model, batch)[0, -10:], predict(model, alone)[0, -10:])
    together = model.generate(**batch, **GREEDY)
    by_itself = model.generate(**alone, attention_mask=torch.ones(1, 10).long(), **GREEDY)
    assert torch.equal(together[0, 18:], by_itself[0, 10:])
    labels[0, 8:] = batch["input_ids"][0, 8:]
    gradients = []
    for given in ({**batch, "labels": labels}, {**alone, "labels": labels[:1, 8:]}):
        model.zero_grad()
        loss_of(model.train(), given).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trainable(model).items()})
    if kind != "p-lstm":  # whose dropout draws at each call
        assert_all_near(*gradients)


@pytest.mark.parametrize("left", [True, False])
@each_kind
def test_a_classifier_that_reads_the_last_token_finds_it_before_pads(kind: str, left: bool) -> None:
    def build() -> Any:
        config = LLAMA.model().config
        config.num_labels = 3
        return transformers.LlamaForSequenceClassification(config)

    model, batch = tuned(kind, Specimen("classifier", build, dict)), padded(token_ids(length=9), pads=3, left=left)
    alone = {"input_ids": batch["input_ids"][:1, 3:] if left else batch["input_ids"][:1, :-3]}
    assert_near(predict(model, batch)[0], predict(model, alone)[0])


@each_causal
@each_kind
def test_each_new_token_from_the_cache_is_that_of_the_whole(kind: str, specimen: Specimen) -> None:
    model = tuned(kind, specimen)
    ids = token_ids(length=6)
    options = {**GREEDY, "attention_mask": torch.ones_like(ids), "output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(input_ids=ids, **options)
    whole = model.generate(input_ids=ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, whole.sequences)
    assert_near(torch.stack(cached.logits), torch.stack(whole.logits))
    forced = predict(model, {"input_ids": cached.sequences[:, :-1]})[:, -8:]
    assert_near(torch.stack(cached.logits, dim=1), forced)


@pytest.mark.parametrize("mask", [True, False])
@each_kind
def test_an_encoder_decoder_generates_what_it_is_taught(kind: str, mask: bool) -> None:
    model = tuned(kind, T5)
    inputs: dict[str, Tensor] = padded(token_ids(length=9), pads=3, left=False) if mask else {"input_ids": token_ids()}
    found = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    forced = predict(model, {**inputs, "decoder_input_ids": found.sequences[:, :-1]})
    assert_near(torch.stack(found.logits, dim=1), forced)


@each_kind
def test_positions_and_embeddings_of_one_s_own(kind: str) -> None:
    model, ids = tuned(kind, GPT2), token_ids()
    expected = predict(model, {"input_ids": ids})
    positions = torch.arange(ids.shape[1])[None]
    assert_near(predict(model, {"input_ids": ids, "position_ids": positions}), expected)
    assert_near(predict(model, {"inputs_embeds": model.get_input_embeddings()(ids)}), expected)
    assert_near(model.eval()(ids)[0].detach(), expected)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("specimen", TEXTUAL, ids=lambda specimen: specimen.name)
@pytest.mark.parametrize("kind", ["prompt", "p-mlp", "prefix", "projected-prefix"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_gradients_are_the_same_with_checkpointing(kind: str, specimen: Specimen, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tuned(kind, specimen).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        # Two forwards before the backward: each layer is computed again with the prefix of its own forward.
        both = [functools.partial(loss_of, model, specimen.batch()) for _ in range(2)]
        if checkpointing and reentrant and kind == "projected-prefix":
            with pytest.raises(ConfigError, match="use_reentrant=False"):
                both[0]()
            return
        sum((loss() for loss in both), torch.tensor(0.0)).backward()
        gradients.append({name: parameter.grad for name, parameter in trainable(model).items()})
        assert not checkpointing or model.is_gradient_checkpointing
    assert_all_near(*gradients)


@each_kind
def test_a_step_without_labels_keeps_a_cache_only_if_asked(kind: str) -> None:
    model = tuned(kind, LLAMA)
    ids = token_ids()
    assert model(input_ids=ids, use_cache=False).past_key_values is None
    assert model(input_ids=ids).past_key_values.get_seq_length() == 5 + ids.shape[1]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_training_resumes_with_the_encoder(kind: str, tmp_path: Path) -> None:
    """Saved, loaded to be trained on, and as transformers' Trainer does it, into a model that has the adapter."""
    model = tuned(kind, LLAMA)
    model.save_pretrained(tmp_path)
    loaded = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path, is_trainable=True)
    assert_same(adapter_tensors(slimtune, loaded), adapter_tensors(slimtune, model))
    fresh = slimtune.get_peft_model(LLAMA.model(), CONFIGS[kind]())
    fresh.load_state_dict(adapter_tensors(slimtune, model))
    assert_same(adapter_tensors(slimtune, fresh), adapter_tensors(slimtune, model))
    inference = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
    assert list(adapter_tensors(slimtune, inference)) == ["prompt_embeddings"]
    assert not any("encoder" in name for name, _ in inference.named_modules())
    assert torch.equal(predict(inference, LLAMA.batch()), predict(model, LLAMA.batch()))


@each_kind
@pytest.mark.parametrize("specimen", [LLAMA, T5], ids=lambda specimen: specimen.name)
def test_beside_lora(kind: str, specimen: Specimen) -> None:
    """LoRA and a prompt together are the prompt on the model that LoRA makes, in either order."""
    lora = slimtune.LoraConfig(r=4, **specimen.options())
    alone = randomize(slimtune, slimtune.get_peft_model(specimen.model(), copy.deepcopy(lora)), seed=6)
    merged = slimtune.get_peft_model(alone.merge_and_unload(), CONFIGS[kind]())
    expected = predict(randomize(slimtune, merged), specimen.batch())
    model = tuned(kind, specimen)
    model.add_adapter("lora", lora)
    randomize(slimtune, model, "lora", seed=6)
    for names in (["default", "lora"], ["lora", "default"]):
        model.set_adapter(names)
        assert_near(predict(model, specimen.batch()), expected)
    loss_of(model.train(), specimen.batch()).backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())
    assert any("lora_A" in name for name in trainable(model))


@pytest.mark.parametrize("specimen", [LLAMA, T5], ids=lambda specimen: specimen.name)
def test_two_prompts_take_turns_but_not_together(specimen: Specimen) -> None:
    model = tuned("prompt", specimen)
    first = predict(model, specimen.batch())
    model.add_adapter("other", CONFIGS["prompt"]())
    with pytest.raises(ConfigError, match="can't be active together"):
        model.set_adapter(["default", "other"])
    model.set_adapter("other")
    assert not torch.equal(predict(model, specimen.batch()), first)
    model.set_adapter("default")
    assert torch.equal(predict(model, specimen.batch()), first)


@each_kind
def test_merging_is_refused(kind: str) -> None:
    model = tuned(kind, LLAMA)
    with pytest.raises(MergeError, match="soft prompt"):
        model.merge_and_unload()


@pytest.mark.parametrize("kind", ["prompt", "p-lstm", "prefix", "projected-prefix"])
@pytest.mark.parametrize("specimen", [LLAMA, T5, BERT], ids=lambda specimen: specimen.name)
def test_in_float32_on_a_base_in_bfloat16(kind: str, specimen: Specimen) -> None:
    model = slimtune.get_peft_model(specimen.model().to(torch.bfloat16), CONFIGS[kind]())
    assert {parameter.dtype for name, parameter in trainable(model).items() if "whole" not in name} == {torch.float32}
    assert predict(model, specimen.batch()).dtype == torch.bfloat16
    loss_of(model.train(), specimen.batch()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable(model).values())


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.parametrize("specimen", [*CAUSAL, BERT], ids=lambda specimen: specimen.name)
def test_started_from_a_text_the_model_reads_that_text(specimen: Specimen, tokenizer: str) -> None:
    """Virtual tokens that are words, as embeddings or as keys and values, are those words in front."""
    text = {"num_virtual_tokens": 4, "tokenizer_name_or_path": tokenizer}
    words = torch.tensor([[7, 9, 11, 7]])  # three words for four tokens: the first comes again
    ids = specimen.batch()["input_ids"]
    prompt = slimtune.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="w7 w9 w11", **text)
    expected = predict(specimen.model(), {"input_ids": torch.cat([words.expand(2, -1), ids], dim=1)})
    assert_near(predict(slimtune.get_peft_model(specimen.model(), prompt), {"input_ids": ids}), expected)
    if specimen is BERT:  # where the words would look at the text as well
        return
    prefix = slimtune.PrefixTuningConfig(prefix_init="TEXT", prefix_init_text="w7 w9 w11", **text)
    model = slimtune.get_peft_model(specimen.model(), prefix)
    assert_near(predict(model, {"input_ids": ids}), expected[:, 4:])


def test_started_from_drawn_words() -> None:
    rows = LLAMA.model().get_input_embeddings().weight
    config = slimtune.PromptTuningConfig(prompt_tuning_init=slimtune.PromptTuningInit.SAMPLE_VOCAB)
    model = slimtune.get_peft_model(LLAMA.model(), config)
    drawn = adapter_tensors(slimtune, model)["prompt_embeddings"]
    assert all((rows == row).all(1).any() for row in drawn)
    prefixes = []
    for seed in (1, 2):
        base = LLAMA.model()
        torch.manual_seed(seed)
        prefix = slimtune.get_peft_model(base, slimtune.PrefixTuningConfig(prefix_init="SAMPLE_VOCAB"))
        prefixes.append(adapter_tensors(slimtune, prefix)["prompt_embeddings"])
    assert not torch.equal(*prefixes)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str) -> None:
    model = tuned(kind, LLAMA)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = predict(model, LLAMA.batch())
    assert_near(rounded, predict(model, LLAMA.batch()), 0.05)


@pytest.mark.parametrize("projection", [True, False])
def test_a_prefix_of_zeros(projection: bool) -> None:
    config = slimtune.PrefixTuningConfig(init_weights="zero", prefix_projection=projection)
    model = slimtune.get_peft_model(LLAMA.model(), config)
    assert not adapter_tensors(slimtune, model)["prompt_embeddings"].any()


def test_the_formula_of_a_prefix_in_float64() -> None:
    """One head's attention over [P_K; K] and [P_V; V], written out, for the first layer of GPT-2."""
    specimen = Specimen("gpt2", GPT2.build, GPT2.inputs)
    model = slimtune.get_peft_model(specimen.model().double(), slimtune.PrefixTuningConfig(num_virtual_tokens=3))
    attention, seen = model.transformer.h[0].attn, {}
    attention.register_forward_hook(lambda m, args, kwargs, out: seen.update(x=args[0], y=out[0]), with_kwargs=True)
    model.eval()(input_ids=token_ids(rows=1))
    x_TD = seen["x"][0]
    q_TD, k_TD, v_TD = attention.c_attn(x_TD).split(32, dim=1)
    prefix = adapter_tensors(slimtune, model)["prompt_embeddings"].view(3, 4, 4, 8)  # layers x (key, value), heads
    heads = []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        k_SD, v_SD = torch.cat([prefix[:, 0, h], k_TD[:, part]]), torch.cat([prefix[:, 1, h], v_TD[:, part]])
        scores_TS = q_TD[:, part] @ k_SD.T / 8**0.5
        later = torch.ones(7, 10).triu(4).bool()
        heads.append(scores_TS.masked_fill(later, -torch.inf).softmax(-1) @ v_SD)
    assert_near(seen["y"][0], attention.c_proj(torch.cat(heads, dim=1)), 1e-12)


@pytest.mark.slow
def test_greedy_words_of_a_real_model_with_pads(smollm2: Any, smollm2_tokenizer: Any) -> None:
    for config in (
        slimtune.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"),
        slimtune.PrefixTuningConfig(num_virtual_tokens=4, prefix_init="SAMPLE_VOCAB"),
    ):
        model = slimtune.get_peft_model(copy.deepcopy(smollm2), config).eval()
        texts = ["The capital of France is", "One frozen base and a tiny trainable delta make"]
        batch = smollm2_tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        assert not batch["attention_mask"].all()
        together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for row, text in zip(together, texts, strict=True):
            one = smollm2_tokenizer(text, return_tensors="pt")
            alone = model.generate(**one, max_new_tokens=6, do_sample=False)[0, one["input_ids"].shape[1] :]
            assert row.tolist() == alone.tolist()


def test_layers_that_lora_changes_too_are_found() -> None:
    """A prefix on a model whose projections carry LoRA already."""
    config = slimtune.LoraConfig(r=2, target_modules=LLAMA_LINEARS)
    model = slimtune.get_peft_model(LLAMA.model(), config)
    model.add_adapter("prefix", CONFIGS["prefix"]())
    model.set_adapter(["default", "prefix"])
    assert predict(model, LLAMA.batch()).shape == (2, 7, VOCABULARY)


def test_a_text_is_read_with_the_tokenizer_of_a_packaged_model(smollm2: Any, smollm2_tokenizer: Any) -> None:
    text = "Turn the order into JSON."
    ids = smollm2_tokenizer(text)["input_ids"]
    config = slimtune.PromptTuningConfig(
        num_virtual_tokens=len(ids),
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path="smollm2-135m-instruct",
    )
    model = slimtune.get_peft_model(copy.deepcopy(smollm2), config)
    rows = smollm2.get_input_embeddings().weight[ids]
    assert torch.equal(adapter_tensors(slimtune, model)["prompt_embeddings"], rows)
