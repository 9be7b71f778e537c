"""Where a run is reported to besides its own files: the trackers that transformers knows."""

from __future__ import annotations

from collections.abc import Sequence

from slimtune.errors import ConfigError, MissingDependencyError, did_you_mean

PACKAGES = {
    "azure_ml": "azureml-core", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet-ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "mlflow": "mlflow", "neptune": "neptune",
    "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
"""The trackers by transformers' names, each with what pip calls it."""


def read_trackers(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """The trackers that `report_to` names: one, several (a list, or between commas), or "none".

    Raises: ConfigError, for a name that transformers has no integration for.
    """
    named = report_to.split(",") if isinstance(report_to, str) else report_to
    found = tuple(name.strip() for name in named if name.strip() not in ("", "none"))
    for name in found:
        if name not in PACKAGES:
            near = did_you_mean(name, PACKAGES) or f"; there are {', '.join(PACKAGES)}, and none"
            raise ConfigError(f"report_to names no tracker '{name}'{near}")
    return found


def check_installed(trackers: Sequence[str]) -> None:
    """See that transformers can report to them here. Raises: MissingDependencyError."""
    from transformers.integrations import integration_utils as known

    # transformers' own word for a tracker that is there: some are not usable though they are installed.
    checks = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
    for name in trackers:
        if not getattr(known, f"is_{checks.get(name, name)}_available")():
            raise MissingDependencyError(
                f"report_to names {name}, which is not installed, or not set up, here: pip install {PACKAGES[name]}"
            )
