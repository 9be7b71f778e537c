"""A batch whose rows begin alike gives the loss and the gradients of the padded one, with fewer tokens computed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import slimtune
from kinds import NEEDED
from slimtune.core.config import methods
from slimtune.errors import ConfigError, TargetError
from slimtune.models.prefix_trial import check_shares, counts_columns
from slimtune.models.shared_prefixes import (
    SharedTokens,
    masks_packed_rows,
    shared_prefixes,
)
from small_seq2seq import bart, t5
from tensors import randomize
from zoo import BERT, GEMMA3, GPT2, GPT_NEOX, LLAMA, QUANTIZED, QWEN2, T5, TIED_LLAMA, VOCABULARY, Specimen

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=8),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "phi3": lambda: transformers.Phi3Config(**SMALL, pad_token_id=0),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=8),
    "deepseek": lambda: transformers.DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=8, n_group=2, topk_group=1,
        num_experts_per_tok=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    **{specimen.name: specimen.model for specimen in (LLAMA, TIED_LLAMA, QWEN2, GPT2, GPT_NEOX, GEMMA3)},
    **{name: lambda config=config: from_config(config()) for name, config in CONFIGS.items()},
}


def from_config(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def batch() -> dict[str, Tensor]:
    """Six rows: three branch after 25 tokens, two of them again; one stands twice; one is short, one a stranger."""
    torch.manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (6, 40))
    ids[1:3, :25] = ids[0, :25]
    ids[2, :34] = ids[1, :34]
    ids[3] = ids[0]
    mask = torch.ones_like(ids)
    mask[1, 38:] = 0
    mask[5, 10:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    # What is shared is learned, too, by each row that has it.
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learn(
    model: Any, inputs: dict[str, Tensor], shares: bool, left_padded: bool = False, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    with shared_prefixes(model, left_padded=left_padded) if shares else nullcontext(SharedTokens()) as tokens:
        loss = model(**inputs, **options).loss
        loss.backward()
    if shares:
        assert tokens.computed < 0.6 * tokens.given
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: Any, inputs: dict[str, Tensor], **options: Any) -> None:
    loss, gradients = learn(model, inputs, shares=False, **options)
    ours, our_gradients = learn(model, inputs, shares=True, **options)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    assert gradients
    assert our_gradients.keys() == gradients.keys()
    whole = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        # A bias of keys has a gradient of nothing but rounding, so what is compared with is the largest of all.
        assert float((our_gradients[name] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), whole), name


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_padded_batch(name: str, checkpointed: bool) -> None:
    model = MODELS[name]()
    check_shares(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_step(model.train(), batch())


def attaching() -> list[str]:
    names = []
    for method in sorted(methods()):
        try:
            model = slimtune.get_peft_model(LLAMA.model(), methods()[method](**NEEDED.get(method, {})))
        except (TargetError, ConfigError):
            continue
        if not model.active_peft_config.is_prompt_learning:
            names.append(method)
    return names


@pytest.mark.one_in(3)
@pytest.mark.parametrize("specimen", [LLAMA, *QUANTIZED], ids=lambda specimen: specimen.name)
@pytest.mark.parametrize("method", attaching())
def test_every_method_learns_the_same(method: str, specimen: Specimen) -> None:
    torch.manual_seed(0)
    config = methods()[method](**NEEDED.get(method, {}))
    model = randomize(slimtune, slimtune.get_peft_model(specimen.model(), config))
    check_shares(model)
    assert_same_step(model.train(), batch())


PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: slimtune.PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": lambda: slimtune.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix tuning": lambda: slimtune.PrefixTuningConfig(num_virtual_tokens=5),
    "projected prefix": lambda: slimtune.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("prompt", "name"),
    # A trained prefix in layers with a window is refused, see below.
    [(p, n) for p in PROMPTS for n in ("tied-llama", "gpt2", "gemma2", "qwen3") if "prefix" not in p or n != "gemma2"],
)
def test_virtual_tokens_in_front_of_all_rows_are_shared(prompt: str, name: str, checkpointed: bool) -> None:
    torch.manual_seed(0)
    base = MODELS[next(known for known in MODELS if known.endswith(name))]()
    model = randomize(slimtune, slimtune.get_peft_model(base, PROMPTS[prompt]()))
    check_shares(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = batch()
    assert_same_step(model.train(), inputs)
    del inputs["attention_mask"]
    assert_same_step(model, inputs)
    # Padded on the left, where the virtual tokens stand behind the padding.
    assert_same_step(model, answers())


ENCODED: dict[str, Callable[[], Any]] = {
    "t5": lambda: None, "lora": slimtune.LoraConfig, "prompt tuning": PROMPTS["prompt tuning"],
    "prefix tuning": PROMPTS["prefix tuning"],
}  # fmt: skip


@pytest.mark.parametrize("build", [T5.model, bart], ids=["t5", "bart"])
@pytest.mark.parametrize("method", ENCODED)
def test_an_encoder_reads_a_prompt_of_several_targets_once(method: str, build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    config = ENCODED[method]()
    model = build() if config is None else randomize(slimtune, slimtune.get_peft_model(build(), config))
    check_shares(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    torch.manual_seed(1)
    ids = torch.randint(4, 15, (6, 12))
    # Three targets of one prompt and two of another, padded alike; one prompt differs by its padding alone.
    ids[1] = ids[2] = ids[0]
    ids[4] = ids[3]
    ids[5] = ids[3]
    mask = torch.ones_like(ids)
    mask[3:5, 9:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(4, 15, (6, 7))}
    assert_same_step(model.train(), inputs)
    with shared_prefixes(model) as tokens:
        model(**inputs)
    assert (tokens.given, tokens.computed) == (6 * 12, 3 * 12)


def test_without_its_prompt_a_model_shares_as_ever() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), PROMPTS["prompt tuning"]()).eval()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with model.disable_adapter(), shared_prefixes(model) as tokens:
        together = model(**inputs, use_cache=False).logits
    with model.disable_adapter():
        apart = model(**inputs, use_cache=False).logits
    assert tokens.computed < 0.6 * tokens.given == 0.6 * inputs["input_ids"].numel()
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(together[kept], apart[kept], rtol=1e-4, atol=1e-5)


def test_embeddings_of_the_callers_own_stay_as_they_are() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), PROMPTS["prompt tuning"]()).train()
    embeds = model.get_input_embeddings()(batch()["input_ids"])
    with shared_prefixes(model) as tokens:
        model(inputs_embeds=embeds, attention_mask=batch()["attention_mask"], use_cache=False)
    assert tokens.given == 0


def test_packed_rows_share_too() -> None:
    inputs, model = batch(), LLAMA.model().train()
    # Two texts a row, without a mask: positions begin anew.
    ids = inputs["input_ids"].reshape(3, 80)
    positions = torch.arange(40).repeat(2).expand(3, -1)
    assert_same_step(model, {"input_ids": ids, "position_ids": positions, "labels": ids}, use_cache=False)


def packed_strangers() -> dict[str, Tensor]:
    """Two packed rows of texts that share nothing: of 7, 20, 9 and 30 tokens, and of others; the second is padded."""
    torch.manual_seed(2)
    ids, positions = torch.randint(4, VOCABULARY, (2, 66)), torch.zeros(2, 66, dtype=torch.long)
    for row, lengths in enumerate([(7, 20, 9, 30), (31, 6, 5, 18)]):
        positions[row, : sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
        ids[row, sum(lengths) :] = 0
    labels = ids.clone()
    # As `PackRows` has it: the first token of a text isn't predicted, and padding isn't learned.
    labels[positions == 0] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_texts_of_packed_rows_attend_apart_and_learn_the_same(name: str, checkpointed: bool) -> None:
    model = MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = []
    for around in (nullcontext, lambda: shared_prefixes(model)):
        model.zero_grad()
        with around() as tokens:
            loss = model(**packed_strangers(), use_cache=False).loss
            loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    # Padding, of which all tokens are alike, is one token of the tree.
    assert tokens is not None
    assert tokens.computed == 66 + 60 + 1
    assert tokens.masked_pairs == 2 * 66**2 > 2.9 * tokens.pairs
    (masked, by_mask), (apart, by_texts) = found
    torch.testing.assert_close(apart, masked, rtol=1e-5, atol=1e-6)
    whole = max(float(gradient.norm()) for gradient in by_mask)
    for one, other in zip(by_texts, by_mask, strict=True):
        assert float((one - other).norm()) <= 1e-5 * max(float(other.norm()), whole)


def test_where_flash_attention_finds_the_texts_packed_rows_stay() -> None:
    model = LLAMA.model()
    assert masks_packed_rows(model)
    model.config._attn_implementation = "flash_attention_2"
    assert not masks_packed_rows(model)
    tokens = SharedTokens(100, 100, 10_000, 1_000)
    assert tokens.pays
    assert not tokens.of_tokens_alone().pays


def test_one_long_text_a_row_stays_under_its_mask() -> None:
    inputs, model = packed_strangers(), LLAMA.model().train()
    inputs["position_ids"] = torch.arange(66).expand(2, -1).clone()
    inputs["position_ids"][:, 60:] = torch.arange(6)
    with shared_prefixes(model) as tokens:
        model(**inputs, use_cache=False)
    assert not tokens.pays
    assert tokens.computed == tokens.given == 2 * 66


def test_padding_on_the_left() -> None:
    model, inputs = LLAMA.model().train(), batch()
    turned = {name: value.flip(1) for name, value in inputs.items()}
    turned["input_ids"][:, 20:] = turned["input_ids"][0, 20:]
    # Positions from the padding on are the model's own way: each row has others, and nothing is shared.
    with shared_prefixes(model) as tokens:
        model(**turned)
    assert tokens.given == 0
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    given = {name: torch.cat([torch.full((6, 3), fill), inputs[name]], 1) for name, fill in fills.items()}
    assert_same_step(model, given | {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp_min(0)})


def answers() -> dict[str, Tensor]:
    """Four answers to each of two prompts, the shorter one padded on the left, without positions, as TRL has them."""
    torch.manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (8, 40))
    ids[:4, :30], ids[4:, :30] = ids[0, :30].clone(), ids[4, :30].clone()
    mask = torch.ones_like(ids)
    mask[:4, :9] = 0
    # Answers of different lengths.
    mask[2:6, 36:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :30] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral"])
def test_answers_to_prompts_padded_on_the_left(name: str) -> None:
    model = MODELS[next(known for known in MODELS if known.startswith(name))]().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert counts_columns(model)
    assert_same_step(model, answers(), left_padded=True)


def test_a_model_that_counts_positions_by_its_mask_is_known() -> None:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    assert not counts_columns(from_config(config))


@pytest.mark.parametrize("options", [{"use_cache": True}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_what_a_tree_could_not_give_is_computed_as_ever(options: dict[str, bool]) -> None:
    model = LLAMA.model().train()
    with shared_prefixes(model) as tokens:
        output = model(**batch(), **options)
    assert tokens.given == 0
    assert output.hidden_states is not None or "output_hidden_states" not in options
    assert output.past_key_values is not None or "use_cache" not in options


def test_rows_with_adapters_of_their_own_share_nothing() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig()).eval()
    with shared_prefixes(model, always=True) as tokens:
        model(**batch(), adapter_names=["default"] * 5 + ["__base__"])
    assert tokens.given == 0


def test_batches_that_share_nothing_stay_as_they_are() -> None:
    model = LLAMA.model().train()
    with shared_prefixes(model) as tokens:
        model(input_ids=torch.arange(40).reshape(2, 20))
    assert tokens.given == tokens.computed == 40
    assert tokens.ratio == 1


def test_generation_and_evaluation_go_on_within_it_and_nothing_stays_behind() -> None:
    model, ids = LLAMA.model().eval(), batch()["input_ids"][:2, :20]
    own = model.config._attn_implementation
    before, logits = model.generate(ids, max_new_tokens=5, do_sample=False), model(ids).logits
    with shared_prefixes(model) as tokens:
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
        assert tokens.given == 0
        torch.testing.assert_close(model(ids, use_cache=False).logits, logits)
        assert tokens.computed == tokens.given / 2
    assert model.config._attn_implementation == own
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


def mamba() -> Any:
    return from_config(transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2))


def llama4() -> Any:
    return from_config(
        transformers.Llama4TextConfig(**SMALL, head_dim=8, intermediate_size_mlp=64, num_local_experts=2)
    )


def falcon() -> Any:
    return from_config(
        transformers.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )


def prefixed() -> Any:
    return slimtune.get_peft_model(MODELS["mistral"](), slimtune.PrefixTuningConfig(num_virtual_tokens=3))


WINDOW: dict[str, Any] = {"sliding_window": 32}
EXPERTS: dict[str, Any] = {"num_local_experts": 4}


def masked_by_window() -> Any:
    """Mixtures whose layers see a window by the mask alone."""
    return from_config(transformers.PhimoeConfig(**SMALL, **EXPERTS, **WINDOW))


def told_of_a_window() -> Any:
    """Layers that are told of a window, which no mask shows."""
    return from_config(transformers.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, **WINDOW))


def multimodal() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=SMALL | {"head_dim": 8}, vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def without_a_decoder() -> Any:
    """A model whose `get_decoder` gives its head."""
    sizes = {name: size for name, size in SMALL.items() if name != "num_key_value_heads"}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return from_config(transformers.ModernBertDecoderConfig(**sizes, **special))


def routed() -> Any:
    return from_config(transformers.MixtralConfig(**SMALL, **EXPERTS, output_router_logits=True))


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (masked_by_window, "differ by"), (told_of_a_window, "differ by"), (multimodal, "more than text"),
        (without_a_decoder, "no decoder alone"), (routed, "by their tokens"),
        (mamba, "layers of linear_attention"), (llama4, "layers of chunked_attention"), (falcon, "must match the size"),
        (BERT.model, "can't share prefixes"), (prefixed, "the last 8 tokens alone"),
    ],
)  # fmt: skip
def test_models_that_can_t_are_refused(build: Callable[[], Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check_shares(build())


def test_a_window_that_layers_are_told_of_is_kept() -> None:
    model = from_config(transformers.MistralConfig(**SMALL, **WINDOW))
    check_shares(model)
    assert model.config.sliding_window == 32
    ids = torch.randint(4, VOCABULARY, (4, 64))
    ids[:, :40] = ids[0, :40]
    assert_same_step(model.train(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


def with_a_hole(inputs: dict[str, Tensor]) -> None:
    inputs["attention_mask"][:, 12:15] = 0
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)


def with_positions_anew(inputs: dict[str, Tensor]) -> None:
    inputs["attention_mask"][:] = 1
    inputs["position_ids"] = torch.cat([torch.arange(20), torch.arange(20)]).expand(6, -1)


def with_labels_on_padding(inputs: dict[str, Tensor]) -> None:
    inputs["labels"] = inputs["input_ids"]


def with_targets_on_padding(inputs: dict[str, Tensor]) -> None:
    inputs["shift_labels"] = inputs["input_ids"].roll(-1, 1)


@pytest.mark.parametrize("prompt", [None, *PROMPTS])
@pytest.mark.parametrize("change", [with_a_hole, with_positions_anew, with_labels_on_padding, with_targets_on_padding])
def test_what_a_tree_has_no_form_for_is_left_as_it_is(
    change: Callable[[dict[str, Tensor]], None], prompt: str | None
) -> None:
    model, inputs = LLAMA.model(), batch()
    if prompt is not None:
        model = randomize(slimtune, slimtune.get_peft_model(model, PROMPTS[prompt]()))
    change(inputs)
    if prompt is not None and inputs.keys() & {"position_ids", "shift_labels"}:
        pytest.skip("virtual tokens have columns of their own, which neither of them has")
    steps = []
    for shares in (False, True):
        model.train().zero_grad()
        torch.manual_seed(0)
        with shared_prefixes(model) if shares else nullcontext(SharedTokens()) as tokens:
            loss = model(**inputs).loss
            loss.backward()
        assert tokens.given == 0
        steps.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*steps, strict=True):
        assert torch.equal(one, other)


def test_hidden_states_that_the_config_asks_for_are_those_of_the_rows() -> None:
    model, inputs = LLAMA.model().eval(), batch()
    model.config.output_hidden_states = True
    with torch.no_grad(), shared_prefixes(model, always=True):
        states = model(**inputs, use_cache=False).hidden_states
    assert {each.shape[:2] for each in states} == {(6, 40)}


def test_a_trial_leaves_the_modes_of_all_modules() -> None:
    model = LLAMA.model().train()
    model.model.layers[0].eval()
    check_shares(model)
    assert [layer.training for layer in model.model.layers][:2] == [False, True]
    assert model.training


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_behind_the_block_fails_where_layers_run_again(reentrant: bool) -> None:
    model = LLAMA.model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with shared_prefixes(model):
        loss = model(**batch(), use_cache=False).loss
    # By another attention than the forward pass had, its gradients would be wrong without a word.
    with pytest.raises(RuntimeError):
        loss.backward()


def test_a_block_within_another_is_refused() -> None:
    model = LLAMA.model()
    with shared_prefixes(model), pytest.raises(ConfigError, match="shares prefixes already"), shared_prefixes(model):
        pass
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["prompt", "encoder-decoder"])
def test_threads_may_run_one_model_within_a_block(kind: str) -> None:
    if kind == "prompt":
        model, inputs = slimtune.get_peft_model(LLAMA.model(), PROMPTS["prompt tuning"]()), batch()
    else:
        model, ids = t5(), batch()["input_ids"] % 16
        inputs = {"input_ids": ids[:1].expand(6, -1), "labels": ids}
    model.eval()
    expected: list[Any] = []
    found: list[tuple[int, Any]] = []

    def run(rows: int) -> Any:
        with torch.no_grad():
            return model(**{name: tensor[:rows] for name, tensor in inputs.items()}).loss

    with shared_prefixes(model, always=True):
        expected = [run(rows) for rows in (3, 6)]
        threads = [
            threading.Thread(target=lambda at=at, rows=rows: [found.append((at, run(rows))) for _ in range(30)])
            for at, rows in enumerate((3, 6))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 60
    for at, loss in found:
        torch.testing.assert_close(loss, expected[at])
