"""llm-compressor quantizes a folder by GPTQ, on given windows of tokens: one run, for `benchmarks.slim peer`.

It runs in an environment of its own, and so imports nothing of slimtune:

    PYTHON -m benchmarks.slim_peer SPECIFICATION

The specification is JSON: "base" and "output" are folders, "ids" the windows. Prints the seconds of the processor that
it took, and the version. Its AWQ (0.14) wants a GPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from typing import Any

GROUP_SIZE = 64


def main() -> None:
    import torch
    import transformers
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import GPTQModifier  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    wanted = json.loads(sys.argv[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(wanted["base"], dtype=torch.bfloat16)
    rows: Any = [
        {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids)).long()} for ids in wanted["ids"]
    ]
    # With the defaults that it comes with, but for the grid, which is ours.
    weights = QuantizationArgs(num_bits=4, group_size=GROUP_SIZE, strategy=QuantizationStrategy.GROUP, symmetric=True)
    grid = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    start = time.process_time()
    oneshot(
        model=model,
        # A loader of ours is read as it is: nothing is cut, padded or shuffled.
        dataset=DataLoader(rows, batch_size=4),
        recipe=GPTQModifier(config_groups=grid, ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=len(wanted["ids"][0]),
    )
    seconds = time.process_time() - start
    model.save_pretrained(wanted["output"], save_compressed=True)
    transformers.AutoTokenizer.from_pretrained(wanted["base"]).save_pretrained(wanted["output"])
    print(json.dumps({"seconds": seconds, "version": importlib.metadata.version("llmcompressor")}))


if __name__ == "__main__":
    main()
