"""Train and evaluate an image classifier: `python train.py loss=softmax_nll seed=1`."""

import hydra
from omegaconf import DictConfig

from equiloss.config import resolved
from equiloss.launching import command, launch
from equiloss.losses import config_source

resolved.register_schema()
config_source.install()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float:
    """Do one job; what happens is in equiloss.run."""
    return launch.launch(composed)


if __name__ == "__main__":
    command.main(main)
