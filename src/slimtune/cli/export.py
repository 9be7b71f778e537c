"""`slimtune export`: a model or an adapter in the form that another program reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from slimtune.cli import proposals
from slimtune.cli.options import AdapterBase, Device, Json, Output, Overwrite, StoredDtype, TrustRemoteCode
from slimtune.console.screen import open_screen, print_json


def export(
    source: Annotated[
        str, typer.Argument(metavar="MODEL|ADAPTER", help="A model or an adapter, by folder, Hub id or packaged name.")
    ],
    output: Output,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="hf, gguf, gguf-lora, ollama, vllm, peft, diffusers, kohya (ComfyUI) or onnx.",
            autocompletion=proposals.formats,
        ),
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Of the numbers in GGUF: F32, F16, BF16, Q8_0, Q4_0; a K-quant such as Q4_K_M by llama.cpp's program. "
            "By default F16, and what slimtune quantize wrote keeps its codes.",
        ),
    ] = None,
    base: AdapterBase = None,
    converter: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="llama.cpp's convert_hf_to_gguf.py, for architectures not known here."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0.0, help="Refuse (exit code 1) if the outputs drift further than this KL divergence."),
    ] = None,
    overwrite: Overwrite = False,
    dtype: StoredDtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a model, or an adapter with its base, as another program reads it, and compare it with what it was.

    hf merges into a plain model, gguf writes a file for llama.cpp, ollama one with a Modelfile, gguf-lora the adapter
    alone, vllm the adapter as it is or, where vLLM refuses it, merged; diffusers and kohya rename each other's files.

    Example: slimtune export tuned --to gguf --type Q8_0 --output tuned-gguf
    """
    from slimtune.export.formats import ExportOptions
    from slimtune.export.formats import export as write
    from slimtune.models.load import LoadOptions

    load = LoadOptions(dtype, device, trust_remote_code)
    exported = write(source, to, output, ExportOptions(kind, base, converter, max_kl, load), overwrite)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if as_json:
        print_json({"output": str(output), "format": to, "bytes": size, **asdict(exported)})
        return
    screen = open_screen()
    screen.print(exported.check, markup=False)
    for note in exported.notes:
        screen.print(f"note: {note}", markup=False)
    screen.print(f"{output}: {size / 1e6:,.1f} MB; use it:  {exported.use}", markup=False)
