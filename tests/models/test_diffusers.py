"""Adapters on models of diffusers: they attach, train and merge there, and diffusers loads the file they are put in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import slimtune
from denoisers import ATTENTION, DENOISERS, UNET, Denoiser, unet
from slimtune.errors import AdapterFileError, AdapterNotFoundError, BaseMismatchError, ConfigError
from slimtune.models.diffusers import WEIGHTS_NAME
from tensors import adapter_tensors, assert_near, assert_same, randomize, relative_error, trainable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TARGETS: dict[str, Any] = {"names": ATTENTION, "all-linear": "all-linear", "default": None}
each_denoiser = pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)
each_target = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)


def tuned(denoiser: Denoiser, targets: Any = None, **options: Any) -> Any:
    config = slimtune.LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": targets, **options})
    return randomize(slimtune, slimtune.get_peft_model(denoiser.model(), config)).eval()


def diffusers_loads(denoiser: Denoiser, folder: Path) -> Any:
    model = denoiser.model()
    model.load_lora_adapter(folder, prefix=denoiser.part, weight_name=WEIGHTS_NAME)
    return model


@each_target
@each_denoiser
def test_an_adapter_attaches_and_changes_what_is_predicted(denoiser: Denoiser, targets: Any) -> None:
    config = slimtune.LoraConfig(r=2, target_modules=targets)
    model = slimtune.get_peft_model(denoiser.model(), config)
    expected = denoiser.predict(denoiser.model())
    assert torch.equal(denoiser.predict(model), expected)
    assert relative_error(denoiser.predict(randomize(slimtune, model)), expected) > 1e-2
    assert isinstance(model, type(denoiser.model()))
    with model.disable_adapter():
        assert torch.equal(denoiser.predict(model), expected)
    attention = [name for name in trainable(model) if any(f".{target}.deltas" in name for target in ATTENTION)]
    assert len(attention) >= 8


@each_target
@each_denoiser
def test_diffusers_loads_the_file_and_predicts_the_same(denoiser: Denoiser, targets: Any, tmp_path: Path) -> None:
    model = tuned(denoiser, targets)
    path = slimtune.save_diffusers_lora(tmp_path, **{denoiser.part: model})
    assert path == tmp_path / WEIGHTS_NAME
    assert all(name.startswith(f"{denoiser.part}.") for name in load_file(path))
    assert_near(denoiser.predict(diffusers_loads(denoiser, tmp_path)), denoiser.predict(model))


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "r": 4},
        {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_v": 9}},
        {"use_dora": True},
    ],
    ids=["rslora", "patterns", "dora"],
)
def test_diffusers_takes_the_scale_from_the_file(options: dict[str, Any], tmp_path: Path) -> None:
    model = tuned(UNET, ATTENTION, **options)
    slimtune.save_diffusers_lora(tmp_path, unet=model)
    assert_near(UNET.predict(diffusers_loads(UNET, tmp_path)), UNET.predict(model))


@each_denoiser
def test_the_file_is_read_back(denoiser: Denoiser, tmp_path: Path) -> None:
    model = tuned(denoiser)
    slimtune.save_diffusers_lora(tmp_path, **{denoiser.part: model})
    reread = denoiser.model()
    slimtune.load_diffusers_lora(tmp_path, adapter_name="style", **{denoiser.part: reread})
    assert reread.active_adapters == ["style"]
    assert torch.equal(denoiser.predict(reread), denoiser.predict(model))
    assert not trainable(reread)


@each_denoiser
def test_a_file_of_diffusers_is_read(denoiser: Denoiser, tmp_path: Path) -> None:
    """What `diffusers` wrote, with the config in its metadata and without it, where alpha is the rank."""
    slimtune.save_diffusers_lora(tmp_path, **{denoiser.part: tuned(denoiser, lora_alpha=2)})
    theirs = diffusers_loads(denoiser, tmp_path)
    theirs.save_lora_adapter(tmp_path, adapter_name=next(iter(theirs.peft_config)), weight_name="theirs.safetensors")
    tensors = {f"{denoiser.part}.{name}": t for name, t in load_file(tmp_path / "theirs.safetensors").items()}
    with safe_open(tmp_path / "theirs.safetensors", framework="pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    named = json.dumps({f"{denoiser.part}.{name}": value for name, value in fields.items()})
    for metadata in ({"format": "pt", "lora_adapter_metadata": named}, {"format": "pt"}):
        save_file(tensors, tmp_path / "file.safetensors", metadata=metadata)
        ours = denoiser.model()
        slimtune.load_diffusers_lora(tmp_path / "file.safetensors", **{denoiser.part: ours})
        assert_near(denoiser.predict(ours), denoiser.predict(theirs))


def test_a_dora_file_without_metadata_is_read(tmp_path: Path) -> None:
    model = tuned(UNET, ATTENTION, use_dora=True, r=4, lora_alpha=4)
    tensors = load_file(slimtune.save_diffusers_lora(tmp_path, unet=model))
    assert any("lora_magnitude_vector" in name for name in tensors)
    save_file(tensors, tmp_path / "bare.safetensors")
    reread = UNET.model()
    slimtune.load_diffusers_lora(tmp_path / "bare.safetensors", unet=reread)
    assert_near(UNET.predict(reread), UNET.predict(model))


def test_names_of_older_files_are_read(tmp_path: Path) -> None:
    model = tuned(UNET, ATTENTION, lora_alpha=2)
    older = {
        name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
        for name, tensor in load_file(slimtune.save_diffusers_lora(tmp_path, unet=model)).items()
    }
    save_file(older, tmp_path / "older.safetensors")
    reread = UNET.model()
    slimtune.load_diffusers_lora(tmp_path / "older.safetensors", unet=reread)
    assert torch.equal(UNET.predict(reread), UNET.predict(model))


def clip() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(2)
    return transformers.CLIPTextModel(config).eval()


def pipeline(denoiser: Any, text_encoder: Any) -> Any:
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=None,
        unet=denoiser,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def image(pipe: Any) -> Tensor:
    ids = torch.arange(1, 11).view(2, 5)
    embeds = pipe.text_encoder(ids)[0]
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        num_inference_steps=3,
        height=8 * pipe.vae_scale_factor,
        width=8 * pipe.vae_scale_factor,
        generator=generator,
        output_type="latent",
    ).images


def test_a_pipeline_loads_all_parts_from_one_file(tmp_path: Path) -> None:
    config = slimtune.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    encoder = randomize(slimtune, slimtune.get_peft_model(clip(), config)).eval()
    ours = pipeline(tuned(UNET, ATTENTION), encoder)
    expected = image(ours)
    slimtune.save_diffusers_lora(tmp_path, unet=ours.unet, text_encoder=ours.text_encoder)
    theirs = pipeline(UNET.model(), clip())
    before = image(theirs)
    theirs.load_lora_weights(tmp_path)
    assert relative_error(image(theirs), before) > 1e-2
    assert_near(image(theirs), expected, 1e-4)
    plain = pipeline(UNET.model(), clip())
    slimtune.load_diffusers_lora(tmp_path, unet=plain.unet, text_encoder=plain.text_encoder)
    assert_near(image(plain), expected)


@each_denoiser
def test_merging_and_saving_are_those_of_diffusers(denoiser: Denoiser, tmp_path: Path) -> None:
    model = tuned(denoiser, "all-linear")
    expected = denoiser.predict(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    reread = type(denoiser.model()).from_pretrained(tmp_path / "merged")
    assert_near(denoiser.predict(reread), expected)


@each_denoiser
def test_an_adapter_goes_into_a_folder_of_its_own(denoiser: Denoiser, tmp_path: Path) -> None:
    model = tuned(denoiser)
    model.save_pretrained(tmp_path)
    reread = slimtune.PeftModel.from_pretrained(denoiser.model(), tmp_path)
    assert_same(adapter_tensors(slimtune, reread), adapter_tensors(slimtune, model))
    assert torch.equal(denoiser.predict(reread), denoiser.predict(model))


def step(model: Any, denoiser: Denoiser, autocast: bool) -> list[Tensor]:
    """The gradients of a loss between predicted noise and noise, without two elements that weigh the same."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predicted = model.train()(**denoiser.batch())[0]
    torch.manual_seed(6)
    loss = (predicted.float() - torch.randn_like(predicted.float())).square().mean()
    loss.backward()
    found = [p.grad for p in trainable(model).values()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in found)
    model.zero_grad()
    return [gradient for gradient in found if gradient is not None]


@each_denoiser
def test_gradient_checkpointing_has_the_same_gradients(denoiser: Denoiser) -> None:
    model = tuned(denoiser)
    plain = step(model, denoiser, autocast=False)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    for checkpointed, expected in zip(step(model, denoiser, autocast=False), plain, strict=True):
        assert_near(checkpointed, expected)
    assert any(gradient.any() for gradient in plain)


@each_denoiser
def test_mixed_precision_steps_lower_the_loss(denoiser: Denoiser) -> None:
    """A base in 16 bits under autocast, checkpointed, as training scripts do it; the adapter stays in float32."""
    base = denoiser.model().to(torch.bfloat16)
    model = slimtune.get_peft_model(base, slimtune.LoraConfig(r=2, target_modules=ATTENTION))
    model.enable_gradient_checkpointing()
    own = list(trainable(model).values())
    assert {p.dtype for p in own} == {torch.float32}
    optimizer = torch.optim.AdamW(own, lr=1e-2)
    torch.manual_seed(6)
    noise, losses = torch.randn(denoiser.predict(denoiser.model()).shape), []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model.train()(**denoiser.batch())[0]
        loss = (predicted.float() - noise).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def other_methods() -> list[tuple[Any, str]]:
    return [
        (slimtune.IA3Config(target_modules=["to_k"], feedforward_modules=[]), "is IA3"),
        (slimtune.LoraConfig(r=2, target_modules=["to_k"], modules_to_save=["conv_out"]), "conv_out.weight"),
        (slimtune.LoraConfig(r=2, target_modules=["to_out.0"], bias="lora_only"), "leave out modules_to_save, bias"),
    ]


@pytest.mark.parametrize("case", range(3))
def test_what_diffusers_cannot_load_is_not_written(case: int, tmp_path: Path) -> None:
    config, says = other_methods()[case]
    model = slimtune.get_peft_model(UNET.model(), config)
    with pytest.raises(ConfigError, match=says):
        slimtune.save_diffusers_lora(tmp_path, unet=model)
    assert not (tmp_path / WEIGHTS_NAME).exists()


def test_mistakes_are_told_in_a_sentence(tmp_path: Path) -> None:
    model = tuned(UNET, ATTENTION)
    with pytest.raises(ConfigError, match="did you mean 'unet'"):
        slimtune.save_diffusers_lora(tmp_path, unett=model)
    with pytest.raises(ConfigError, match="name the models"):
        slimtune.save_diffusers_lora(tmp_path)
    with pytest.raises(ConfigError, match="unet has no adapter"):
        slimtune.save_diffusers_lora(tmp_path, unet=UNET.model())
    with pytest.raises(AdapterNotFoundError, match="'other'"):
        slimtune.save_diffusers_lora(tmp_path, "other", unet=model)
    with pytest.raises(AdapterFileError):
        slimtune.load_diffusers_lora(tmp_path, unet=UNET.model())
    slimtune.save_diffusers_lora(tmp_path, unet=model)
    with pytest.raises(ConfigError, match="is for unet, found transformer"):
        slimtune.load_diffusers_lora(tmp_path, transformer=DENOISERS["sd3"].model())
    with pytest.raises(BaseMismatchError, match=r"\(2, 16\) in the file and \(2, 24\) on this model"):
        slimtune.load_diffusers_lora(tmp_path, unet=unet(cross_attention_dim=24))
    save_file({"lora_unet_down.alpha": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(AdapterFileError, match="not in the layout that diffusers writes"):
        slimtune.load_diffusers_lora(tmp_path / "other.safetensors", unet=UNET.model())
