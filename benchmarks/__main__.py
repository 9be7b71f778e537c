"""`python -m benchmarks`: the table of LoRA against peft."""

from benchmarks.lora import app

app(prog_name="python -m benchmarks")
