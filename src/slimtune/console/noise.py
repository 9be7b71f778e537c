"""What libraries write to standard error when they are merely imported, left out; all else that they say is shown.

transformers imports torchao wherever that is installed, and torchao tells of kernels for other machines that it didn't
load. None of it is about what was asked for, and nothing can be done about it.
"""

from __future__ import annotations

import functools
import logging

NOISE = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "register_constant() on Enum subclasses is deprecated",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""By the name of the logger, a part of the message."""


@functools.cache
def leave_out_noise() -> None:
    """From now on, in this process."""
    for name, part in NOISE.items():
        logging.getLogger(name).addFilter(functools.partial(_is_news, part))


def _is_news(part: str, record: logging.LogRecord) -> bool:
    return part not in str(record.msg)
