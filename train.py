"""Train and evaluate an image classifier: `python train.py loss=softmax_nll seed=1`."""

import hydra
from omegaconf import DictConfig

from equiloss.config.resolved import register_schema
from equiloss.launching import command
from equiloss.launching.launch import launch
from equiloss.losses import config_source

register_schema()
config_source.install()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float:
    """Hydra has composed one job; `launch` starts its processes, and `run` runs in each of them."""
    return launch(composed, run="equiloss.run:run")


if __name__ == "__main__":
    command.main(main)
