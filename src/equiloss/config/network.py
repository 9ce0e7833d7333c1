"""`model=…`: the network that turns images into logits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from equiloss.config.checks import is_patterns, open_dict, positive, require
from equiloss.errors import choose

# Hydra's grammar takes the second `=` of a word in quotes alone.
LAST_BLOCKS = re.compile(r"all_but_last[:=](\d{1,6})")
# Endings of the files that model.weights takes.
ENDINGS = (".pth", ".pt", ".safetensors")
# Networks of this project, or of the user's: nobody publishes weights for them.
OWN = ("convnet", "mlp", "custom")


def is_file(weights: str) -> bool:
    """Whether `model.weights` is a file, and not the name of published weights.

    >>> is_file("mine/resnet.pth"), is_file("IMAGENET1K_V1")
    (True, False)
    """
    return weights.endswith(ENDINGS)


def usual_image_size(weights: str | None) -> int | None:
    """Height and width of pictures in files, in pixels; None where published weights decide it.

    >>> usual_image_size(None), usual_image_size("DEFAULT")
    (224, None)
    """
    return 224 if weights is None or is_file(weights) else None


@dataclass
class ModelConfig:
    """The network that turns images into logits."""

    name: str = MISSING
    """convnet | mlp | custom | any classifier of `library`, such as resnet18."""
    library: str = "torchvision"
    """torchvision | timm: whose networks the other names are."""
    target: str | None = None
    """With name=custom: `package.module:function(num_classes=…, in_channels=…, **options)`."""
    options: dict[str, Any] = field(default_factory=open_dict)
    """Keyword arguments of the network."""
    weights: str | None = None
    """What a fit starts from: DEFAULT or a name of the library's published weights, or a file
    (.pth, .pt, .safetensors) with a state dict (null: random weights)."""
    weights_strict: bool = True
    """Refuse weights of which tensors other than the head's do not fit; false leaves them out."""
    download: bool = False
    """Fetch published weights that are not in the library's cache."""
    compile: bool = False
    """Run the network through torch.compile."""
    channels_last: Any = "auto"
    """Keep images and weights in NHWC memory order: true | false | auto (for the convnet in float32
    on a CPU, which is faster with it)."""
    freeze: Any = None
    """What does not learn: null | backbone (all but the head) | all_but_last:N (blocks; the log
    names those that learn; "all_but_last=N", in quotes, is the same) | patterns of parameters or
    modules, as [conv1,layer?,*.bias]. Batch normalisation that is frozen evaluates."""
    unfreeze_after_epochs: int | None = None
    """Epochs after which what is frozen learns too, but for batch normalisation (null: never)."""

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
        positive("model.unfreeze_after_epochs", self.unfreeze_after_epochs)
        require(
            self.unfreeze_after_epochs is None or self.freeze is not None,
            f"model.unfreeze_after_epochs={self.unfreeze_after_epochs} belongs to model.freeze, "
            "and nothing is frozen",
        )
        require(
            self.freeze in (None, "backbone")
            or bool(self.learning_blocks)
            or (bool(self.freeze) and is_patterns(self.freeze)),
            "model.freeze is null, backbone, all_but_last:N with N of at least 1, or a list of "
            f"patterns such as [conv1,layer?]; got {self.freeze}",
        )
        self._check_weights()

    @property
    def learning_blocks(self) -> int | None:
        """N of `freeze=all_but_last:N`."""
        found = LAST_BLOCKS.fullmatch(self.freeze) if isinstance(self.freeze, str) else None
        return int(found[1]) if found else None

    def _check_weights(self) -> None:
        """Refuse what can be no file and no name of published weights."""
        choose("model.library", self.library, ("torchvision", "timm"))
        if self.weights is None or is_file(self.weights):
            return
        file = f"a file ends in {', '.join(ENDINGS)}"
        require(
            not self.weights.endswith(".ckpt"),
            f"model.weights={self.weights}: checkpoints of equiloss go by init_from=; {file}",
        )
        name = re.fullmatch(r"\w+", self.weights) is not None
        require(name, f"model.weights={self.weights} is no name of weights, and {file}")
        require(
            self.library != "torchvision" or self.name not in OWN,
            f"model.weights={self.weights}: nobody publishes weights for model={self.name}; {file}",
        )
