"""Ray Train, sixteen GPUs: python docs/scale/ray_train.py. Ray starts the processes, and each runs the recipe."""

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict) -> None:
    """Run in each process, with RANK, WORLD_SIZE and LOCAL_RANK set."""
    from slimtune.console.screen import open_screen
    from slimtune.pipeline.train import run
    from slimtune.recipe.recipe import Recipe

    run(Recipe.read(config["recipe"]), open_screen(works_on=True))


if __name__ == "__main__":
    # Paths on a disk that all nodes share.
    settings = {"recipe": "/work/recipe.yaml"}
    TorchTrainer(train, train_loop_config=settings, scaling_config=ScalingConfig(num_workers=16, use_gpu=True)).fit()
