"""`model=…`: the network that turns images into logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from equiloss.config.checks import open_dict, require


@dataclass
class ModelConfig:
    """The network that turns images into logits."""

    name: str = MISSING
    """convnet | mlp | custom | any classifier of torchvision, such as resnet18."""
    target: str | None = None
    """With name=custom: `package.module:function(num_classes=…, in_channels=…, **options)`."""
    options: dict[str, Any] = field(default_factory=open_dict)
    """Keyword arguments of the network."""
    compile: bool = False
    """Run the network through torch.compile."""
    channels_last: Any = "auto"
    """Keep images and weights in NHWC memory order: true | false | auto (for the convnet in float32
    on a CPU, which is faster with it)."""

    def __post_init__(self) -> None:
        require(
            self.channels_last in (True, False, "auto"),
            f"model.channels_last is true, false or auto; got {self.channels_last}",
        )
        require(
            (self.name == "custom") == (self.target is not None),
            "model.target names a function for model=custom, and only there: "
            "model=custom model.target=package.module:function",
        )
