"""What libraries log and warn of: shown as text that steers no terminal, but for what they say when merely imported.

transformers imports torchao wherever that is installed, and torchao tells of kernels for other machines that it didn't
load. None of it is about what was asked for, and nothing can be done about it.
"""

from __future__ import annotations

import functools
import logging
import os
import re

from slimtune.console.screen import printable

NOISE = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "register_constant() on Enum subclasses is deprecated",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""By the name of the logger, a part of the message."""


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class _PlainRecord(logging.LogRecord):
    """A record whose message has no colours, and shows other characters that a terminal would obey escaped."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return printable(_COLOURS.sub("", super().getMessage()))


def set_up_logging() -> None:
    """For a process of slimtune's own: libraries' logs and warnings as plain text, of torch's C++ errors alone."""
    logging.setLogRecordFactory(_PlainRecord)
    logging.captureWarnings(True)
    # Read when torch is imported. What it would say: DDP's remark that all parameters were used, by each process.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@functools.cache
def leave_out_noise() -> None:
    """From now on, in this process."""
    for name, part in NOISE.items():
        logging.getLogger(name).addFilter(functools.partial(_is_news, part))


def _is_news(part: str, record: logging.LogRecord) -> bool:
    # The template of the message, before its arguments are put in: cheaper, and the part looked for stands there.
    return part not in str(record.msg)
