"""Importing heavy libraries says nothing by itself; what they have to say otherwise is shown."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from slimtune.console.noise import NOISE, leave_out_noise


def test_a_quantized_model_is_loaded_without_a_word() -> None:
    code = "import slimtune; slimtune.Quantization; import slimtune.quantization.load"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", NOISE)
def test_all_else_is_shown(name: str, caplog: pytest.LogCaptureFixture) -> None:
    leave_out_noise()
    leave_out_noise()
    logger = logging.getLogger(name)
    logger.warning(f"%s: {NOISE[name]}", "a library")
    logger.warning("what matters")
    assert [record.getMessage() for record in caplog.records if record.name == name] == ["what matters"]
