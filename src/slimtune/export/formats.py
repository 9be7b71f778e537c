"""The forms that there are, and a model or an adapter in one of them: the output is whole, checked, or not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimtune.adapters.model import PeftModel
from slimtune.errors import AdapterFileError, ConfigError, check_choice
from slimtune.export.gguf.lora import LORA_FILE, LORA_KINDS, export_gguf_lora
from slimtune.export.gguf.model import MODEL_FILE, check_kind, export_gguf
from slimtune.export.kohya import from_kohya, to_kohya
from slimtune.export.ollama import write_modelfile
from slimtune.export.onnx import ONNX_FILE, check_optimum, export_onnx
from slimtune.models.compatibility import verdicts
from slimtune.models.export import merge_to_folder
from slimtune.models.headers import read_folder
from slimtune.models.load import LoadOptions, load_base, load_model
from slimtune.storage.atomic import refuse_existing, staged
from slimtune.storage.source import base_of, folder_of, is_adapter


@dataclass(frozen=True)
class ExportOptions:
    """How a form is written.

    Attributes:
        kind: the type of the numbers in GGUF; by default F16, beside codes that are kept; for an adapter F32.
        base: in place of the base that an adapter names.
        converter: llama.cpp's own script, for architectures that are not known here.
        max_kl: how far the answers may drift; by default as the form allows.
        load: how the model is loaded.
    """

    kind: str | None = None
    base: str | None = None
    converter: Path | None = None
    max_kl: float | None = None
    load: LoadOptions = field(default_factory=LoadOptions)


@dataclass(frozen=True)
class Exported:
    """What was written: how it was checked, how it is used, and what a reader should know."""

    check: str
    use: str
    notes: list[str] = field(default_factory=list)


def export(source: str, to: str, output: Path, options: ExportOptions, overwrite: bool = False) -> Exported:
    """Write a model or an adapter in one of `FORMATS`.

    Raises:
        ConfigError: no such form, or one that has no place for what the model or the adapter has.
        OutputExistsError: the output holds something.
        MergeError: the answers drift further than the bound.
        MissingDependencyError: a program or a package that isn't installed.
    """
    check_choice("--to", to, list(FORMATS))
    refuse_existing(output, overwrite)
    if options.kind is not None and to not in ("gguf", "gguf-lora", "ollama"):
        raise ConfigError(f"--type is for GGUF, and {to} has none; leave it out")
    if options.converter is not None and to not in ("gguf", "ollama"):
        raise ConfigError(f"--converter is for GGUF of a model, and not for {to}; leave it out")
    # A check that fails leaves nothing behind: what is there at the end was compared.
    with staged(output, overwrite) as folder:
        return FORMATS[to](source, folder, output, options)


def _adapter_only(source: str, to: str) -> str:
    if not is_adapter(source):
        raise AdapterFileError(f"{source} is no adapter folder, which --to {to} is for; pass what train wrote")
    return folder_of(source)


def _load(source: str, options: ExportOptions) -> tuple[Any, Any]:
    if not is_adapter(source):
        return load_model(source, options=options.load)
    model, tokenizer = load_base(source, options.base, options.load)
    return PeftModel.from_pretrained(model, folder_of(source)), tokenizer


def _hf(source: str, folder: Path, output: Path, options: ExportOptions) -> Exported:
    if not is_adapter(source):
        raise ConfigError(f"{source} is a model of transformers already; --to hf is for an adapter, which it merges")
    model, tokenizer = _load(source, options)
    report = merge_to_folder(model, tokenizer, folder, 0.01 if options.max_kl is None else options.max_kl, True)
    return Exported(f"read again: {report.reloaded}", f"slimtune chat {output}")


def _gguf(source: str, folder: Path, output: Path, options: ExportOptions) -> Exported:
    check_kind(options.kind)
    model, tokenizer = _load(source, options)
    report = export_gguf(model, tokenizer, folder, options.kind, options.max_kl, options.converter)
    check = "not compared" if report.drift is None else f"read again: {report.drift}"
    return Exported(check, f"llama-cli -m {output / MODEL_FILE}", report.notes)


def _ollama(source: str, folder: Path, output: Path, options: ExportOptions) -> Exported:
    check_kind(options.kind)
    model, tokenizer = _load(source, options)
    report = export_gguf(model, tokenizer, folder, options.kind, options.max_kl, options.converter)
    notes = write_modelfile(folder, tokenizer, model.generation_config)
    check = "not compared" if report.drift is None else f"read again: {report.drift}"
    name = output.resolve().name.lower()
    return Exported(check, f"ollama create {name} -f {output / 'Modelfile'} && ollama run {name}", report.notes + notes)


def _gguf_lora(source: str, folder: Path, output: Path, options: ExportOptions) -> Exported:
    _adapter_only(source, "gguf-lora")
    model, _ = _load(source, options)
    error = export_gguf_lora(model, folder, options.kind or LORA_KINDS[0])
    use = f"llama-cli -m BASE.gguf --lora {output / LORA_FILE}"
    return Exported(f"read again: updates off by {error:.1e} of their norm at most", use)


def _copied(source: str, folder: Path, engine: str) -> Any:
    """An adapter's files as they are, if an engine takes them. Returns: its verdict."""
    path = Path(source)
    stored = read_folder(path, "adapter_config.json", "adapter_model*.safetensors")
    verdict = next(v for v in verdicts(stored.config, stored.tensors) if v.engine == engine)
    if verdict.takes:
        for file in path.iterdir():
            if file.is_file():
                shutil.copy2(file, folder / file.name)
    return verdict


def _peft(source: str, folder: Path, output: Path, options: ExportOptions) -> Exported:
    path = _adapter_only(source, "peft")
    # Attached once: a file that doesn't fit its base is no use to anybody.
    _load(source, options)
    verdict = _copied(path, folder, "peft")
    if not verdict.takes:
        raise ConfigError(f"peft doesn't take this adapter: {verdict.note}; merge it (--to hf)")
    return Exported("attached to its base", f"PeftModel.from_pretrained(model, {str(output)!r})")


def _vllm(source: str, folder: Path, output: Path, options: ExportOptions) -> Exported:
    path = _adapter_only(source, "vllm")
    verdict = _copied(path, folder, "vLLM")
    if verdict.takes:
        _load(source, options)
        base = options.base or base_of(path)
        use = verdict.note.replace("BASE", base).replace("NAME=FOLDER", f"{output.resolve().name}={output}")
        return Exported("attached to its base", use)
    merged = _hf(source, folder, output, options)
    notes = [f"vLLM doesn't take the adapter ({verdict.note}), so it was merged"]
    return Exported(merged.check, f"vllm serve {output}", notes)


def _kohya(source: str, folder: Path, output: Path, options: ExportOptions) -> Exported:
    to_kohya(Path(source), folder)
    return Exported("read again: the same tensors", f"put {output}/lora.safetensors into ComfyUI/models/loras")


def _diffusers(source: str, folder: Path, output: Path, options: ExportOptions) -> Exported:
    from_kohya(Path(source), folder, None if options.base is None else Path(options.base))
    return Exported("read again: the same tensors", f"pipeline.load_lora_weights({str(output)!r})")


def _onnx(source: str, folder: Path, output: Path, options: ExportOptions) -> Exported:
    check_optimum()
    model, tokenizer = _load(source, options)
    drift = export_onnx(model, tokenizer, folder, options.max_kl)
    use = f"onnxruntime.InferenceSession({str(output / ONNX_FILE)!r}), or optimum's ORTModel classes with the folder"
    return Exported(f"run by onnxruntime: {drift}", use)


FORMATS: dict[str, Callable[[str, Path, Path, ExportOptions], Exported]] = {
    "hf": _hf,
    "gguf": _gguf,
    "gguf-lora": _gguf_lora,
    "ollama": _ollama,
    "vllm": _vllm,
    "peft": _peft,
    "diffusers": _diffusers,
    "kohya": _kohya,
    "onnx": _onnx,
}
"""By what is typed behind --to."""
