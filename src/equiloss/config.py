"""The typed configuration: one dataclass for each Hydra group, each field with meaning and unit.

The classes are the schema that `conf/config.yaml` starts from, so a value of the wrong type is
refused while Hydra composes; `__post_init__` refuses values that have the right type and make
no sense. Defaults live here, and the files in `conf/` hold only what distinguishes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING, DictConfig

from equiloss.errors import ConfigError, choose

TASKS = ("fit", "validate", "test")
SPLIT_METRICS = ("loss", "nll", "acc", "balanced_acc", "acc_top5", "ece")
PRECISIONS = (
    *("64-true", "32-true", "bf16-true", "16-true"),
    *("bf16-mixed", "16-mixed"),
)

# Arguments of Lightning's Trainer that would break "the same number", or that have a key here.
REFUSED_TRAINER_ARGUMENTS = {
    "gradient_clip_val": "set optimizer.gradient_clip_norm, which clips the synchronised gradient",
    "gradient_clip_algorithm": "set optimizer.gradient_clip_norm",
    "accumulate_grad_batches": "set trainer.micro_batch_size, which keeps the loss of the whole "
    "global batch (accumulating means changes it)",
    "use_distributed_sampler": "data.batch_size is global and split without padding",
    "sync_batchnorm": "it follows from the model and the devices",
    "strategy": "it follows from trainer.devices",
    "num_nodes": "a run uses the devices of one machine",
    "num_sanity_val_steps": "the parity check and the set-up checks run before the first step",
    "overfit_batches": "use debug=overfit",
    "fast_dev_run": "use debug=fast",
    "limit_train_batches": "set data.max_samples",
    "limit_val_batches": "set data.max_samples",
    "limit_test_batches": "set data.max_samples",
    "reload_dataloaders_every_n_epochs": "the order of samples is a function of seed and epoch",
    "barebones": "it turns off the logs that prove the guarantee",
    "inference_mode": "evaluation always runs without autograd",
    "logger": "choose a file of conf/logger",
    "callbacks": "choose a file of conf/callbacks",
    "plugins": "checkpoints go through equiloss.checkpoint",
    "default_root_dir": "set hydra.run.dir",
    "enable_checkpointing": "set checkpoint.every_n_steps",
    "enable_progress_bar": "set progress_bar",
    "enable_model_summary": "set model_summary",
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(key: str, value: float | None) -> None:
    _require(value is None or value > 0, f"{key} must be positive, got {value}")


def open_dict() -> Any:
    """An empty node that takes any key, where Hydra would want known ones."""
    return DictConfig({}, flags={"struct": False})


@dataclass
class AugmentConfig:
    """Random augmentation of training images, keyed by (seed, epoch, sample index)."""

    shift: int = 0
    """Largest shift along each axis, in pixels; the border is filled with 0 (0: off)."""
    flip: bool = False
    """Mirror left to right with probability 1/2."""
    transforms: list[Any] = field(default_factory=list)
    """A torchvision.transforms.v2 pipeline instead: a list of `{name: ClassName, **arguments}`."""
    mixup: float = 0.0
    """Mix each row with the one before it, by a share from Beta(mixup, mixup) (0: off)."""
    cutmix: float = 0.0
    """Cut a box from the row before, of a share from Beta(cutmix, cutmix) (0: off)."""

    def __post_init__(self) -> None:
        for key in ("shift", "mixup", "cutmix"):
            value = getattr(self, key)
            _require(value >= 0, f"data.augment.{key} must be at least 0, got {value}")
        _require(
            not (self.transforms and (self.shift or self.flip)),
            "data.augment.transforms replaces data.augment.shift and .flip: set shift=0 flip=false",
        )

    @property
    def mixes(self) -> bool:
        """Whether rows are mixed, so that targets become probabilities."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass
class DataConfig:
    """A dataset, its split and how it is read."""

    name: str = MISSING
    """digits | fashion_mnist | mnist | cifar10 | cifar100 | image_folder | synthetic | custom."""
    root: str | None = None
    """Directory that holds the files (null: where the dataset is looked for by default)."""
    download: bool = False
    """Let torchvision download missing files into `root`."""
    batch_size: int = 50
    """Samples per optimizer step over ALL devices and micro-batches."""
    eval_batch_size: int = 1000
    """Samples per evaluation step over all devices."""
    num_workers: int = 0
    """Loader processes per rank; 0 is fastest for sets that live in memory."""
    val_fraction: float = 0.1
    """Part of the training files that validates, where a dataset has no validation split."""
    test_fraction: float = 0.2
    """Part of all files that tests, where a dataset has no test split."""
    split_seed: int = 0
    """Seed of the stratified split; not the run's seed, so that every run sees the same split."""
    max_samples: int | None = None
    """Use at most this many samples of each split (null: all)."""
    long_tail: float | None = None
    """Thin the training split out until its first class is this many times as large as its last,
    with sizes that fall geometrically in between (null: as it is); val and test stay whole."""
    image_size: int | None = None
    """Resize images to this height and width, in pixels (null: as stored)."""
    mean: list[float] | None = None
    """Mean per channel of pixel values in [0, 1] (null: from the training split)."""
    std: list[float] | None = None
    """Standard deviation per channel of pixel values in [0, 1] (null: from the training split)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    target: str | None = None
    """With name=custom: `package.module:function` that returns the splits."""
    options: dict[str, Any] = field(default_factory=open_dict)
    """Keyword arguments of the dataset: sizes of `synthetic`, or those of `target`."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "eval_batch_size", "max_samples", "image_size"):
            _positive(f"data.{key}", getattr(self, key))
        _require(self.num_workers >= 0, f"data.num_workers must be >= 0, got {self.num_workers}")
        for key in ("val_fraction", "test_fraction"):
            value = getattr(self, key)
            _require(0 < value < 1, f"data.{key} must lie between 0 and 1, got {value}")
        _require(
            self.long_tail is None or 1 <= self.long_tail < math.inf,
            f"data.long_tail must be finite and at least 1, got {self.long_tail}",
        )
        _require(
            (self.name == "custom") == (self.target is not None),
            "data.target names a function for data=custom, and only there: "
            "data=custom data.target=package.module:function",
        )
        if self.std is not None:
            _require(min(self.std) > 0, f"data.std must be positive, got {self.std}")


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
    channels_last: bool = False
    """Keep images and weights in NHWC memory order, which convolutions prefer on many devices."""

    def __post_init__(self) -> None:
        _require(
            (self.name == "custom") == (self.target is not None),
            "model.target names a function for model=custom, and only there: "
            "model=custom model.target=package.module:function",
        )


@dataclass
class OptimizerConfig:
    """An optimizer of torch.optim by name."""

    name: str = "SGD"
    """Class name in torch.optim."""
    lr: float = 0.1
    """Peak learning rate; schedulers scale it."""
    weight_decay: float = 0.0
    """Decay of weights; norms and biases (parameters with fewer than two axes) are exempt."""
    gradient_clip_norm: float | None = None
    """Clip the 2-norm of the synchronised gradient to this (null: off)."""
    options: dict[str, Any] = field(default_factory=open_dict)
    """Further keyword arguments of the optimizer, such as momentum."""

    def __post_init__(self) -> None:
        _positive("optimizer.lr", self.lr)
        _require(
            self.weight_decay >= 0, f"optimizer.weight_decay must be >= 0, got {self.weight_decay}"
        )
        _positive("optimizer.gradient_clip_norm", self.gradient_clip_norm)


@dataclass
class SchedulerConfig:
    """A learning-rate schedule, stepped once per optimizer step."""

    name: str = "constant"
    """cosine | one_cycle | constant | a class name in torch.optim.lr_scheduler."""
    warmup_fraction: float = 0.0
    """Part of the run's steps that warm up linearly, before cosine or constant."""
    options: dict[str, Any] = field(default_factory=open_dict)
    """Further keyword arguments of the torch scheduler."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.warmup_fraction < 1,
            f"scheduler.warmup_fraction must lie in [0, 1), got {self.warmup_fraction}",
        )


@dataclass
class TrainerConfig:
    """Devices, precision and length. `+trainer.<argument>` goes to Lightning's Trainer as it is."""

    accelerator: str = "cpu"
    """cpu | gpu | auto, or another accelerator of Lightning."""
    devices: int = 1
    """Ranks; more than one makes a real process group (-1: every visible GPU)."""
    threads: int | None = None
    """CPU threads of each rank (null: the cores divided among the ranks)."""
    precision: str = "32-true"
    """64-true | 32-true | bf16-mixed | 16-mixed (GPU only) | bf16-true | 16-true."""
    max_epochs: int | None = 15
    """Passes over the training split (null: max_steps alone decides)."""
    max_steps: int | None = None
    """Optimizer steps (null: max_epochs alone decides)."""
    micro_batch_size: int | None = None
    """Largest number of samples per forward pass of a rank (null: its whole slice)."""
    reduction: str = "sum"
    """sum | bitwise: whether results on other numbers of devices are equal up to rounding, or to
    the bit (slower: see docs/bitwise.md)."""
    shards: int = 8
    """With reduction=bitwise: virtual shards of a global batch, a power of two; at most as many
    devices can share the work, and results depend on it."""
    deterministic: bool = False
    """Refuse non-deterministic kernels."""
    log_every_n_steps: int = 1
    """Write training scalars every so many steps."""
    arguments: dict[str, Any] = field(default_factory=open_dict)
    """Arguments of Lightning's Trainer, put here from `+trainer.<argument>`."""

    def __post_init__(self) -> None:
        _require(
            self.devices > 0 or self.devices == -1,
            f"trainer.devices must be positive, or -1 for every visible GPU; got {self.devices}",
        )
        for key in ("threads", "max_epochs", "max_steps", "micro_batch_size", "log_every_n_steps"):
            _positive(f"trainer.{key}", getattr(self, key))
        choose("trainer.precision", self.precision, PRECISIONS)
        choose("trainer.reduction", self.reduction, ("sum", "bitwise"))
        if self.reduction == "bitwise":
            self._check_bitwise()
        for name in self.arguments:
            reason = REFUSED_TRAINER_ARGUMENTS.get(name)
            _require(reason is None, f"trainer.{name} is refused: {reason}")
        _require(
            not (self.accelerator == "cpu" and self.precision == "16-mixed"),
            "trainer.precision=16-mixed needs a GPU (on a CPU it silently runs as bfloat16): "
            "use bf16-mixed or 32-true",
        )
        _require(
            not (self.max_epochs is None and self.max_steps is None),
            "set trainer.max_epochs or trainer.max_steps: one of them must end the run",
        )

    def _check_bitwise(self) -> None:
        why = "trainer.reduction=bitwise"
        _require(
            self.shards > 0 and self.shards & (self.shards - 1) == 0,
            f"trainer.shards must be a power of two, got {self.shards}",
        )
        _require(
            self.micro_batch_size is None,
            f"{why} has micro-batches of its own, the shards: leave trainer.micro_batch_size out, "
            "and set trainer.shards for smaller ones",
        )
        _require(
            self.devices <= self.shards,
            f"{why} shares {self.shards} shards, and trainer.devices is {self.devices}: set "
            "trainer.shards to a power of two that is as large",
        )
        _require(
            self.precision not in ("16-mixed", "16-true"),
            f"{why} does not scale gradients: trainer.precision={self.precision} would lose small "
            "ones; use bf16-mixed or 32-true",
        )

    @property
    def cpu_threads(self) -> int | None:
        """CPU threads of each rank; None divides the cores among the ranks.

        One and two threads add in different orders, so bits need a number that does not depend on
        the ranks.
        """
        return 1 if self.threads is None and self.reduction == "bitwise" else self.threads


@dataclass
class CheckpointConfig:
    """What is kept of the weights."""

    monitor: str = "val/nll"
    """Metric that chooses best.ckpt."""
    mode: str = "min"
    """min | max: whether a smaller or a larger `monitor` is better."""
    every_n_steps: int | None = None
    """Write last.ckpt every so many steps, besides each epoch's end (null: epochs only)."""

    def __post_init__(self) -> None:
        choose("checkpoint.monitor", self.monitor, [f"val/{name}" for name in SPLIT_METRICS])
        choose("checkpoint.mode", self.mode, ("min", "max"))
        _positive("checkpoint.every_n_steps", self.every_n_steps)


@dataclass
class EarlyStoppingConfig:
    """Stop when validation no longer improves."""

    enabled: bool = False
    monitor: str = "val/nll"
    """Metric to watch."""
    mode: str = "min"
    """min | max."""
    patience: int = 5
    """Validations without improvement before the run ends."""
    min_delta: float = 0.0
    """Smallest change that counts, in the metric's unit."""

    def __post_init__(self) -> None:
        choose("early_stopping.monitor", self.monitor, [f"val/{name}" for name in SPLIT_METRICS])
        choose("early_stopping.mode", self.mode, ("min", "max"))
        _positive("early_stopping.patience", self.patience)


@dataclass
class WandbConfig:
    """Weights & Biases. The API key has no key here: `wandb login` or WANDB_API_KEY has it."""

    enabled: bool = False
    project: str | None = None
    """Project (null: WANDB_PROJECT, otherwise equiloss)."""
    entity: str | None = None
    """User or team (null: WANDB_ENTITY, otherwise the default of the login)."""
    name: str | None = None
    """Name of the run (null: its loss and seed)."""
    group: str | None = None
    """Group of the run (null: the sweep's name, otherwise WANDB_RUN_GROUP)."""
    mode: str | None = None
    """online | offline, for `wandb sync` later (null: WANDB_MODE, otherwise online)."""

    def __post_init__(self) -> None:
        if self.mode is not None:
            choose("logger.wandb.mode", self.mode, ("online", "offline"))


@dataclass
class MlflowConfig:
    """MLflow. Passwords have no key here: MLflow reads them from its own variables."""

    enabled: bool = False
    experiment: str | None = None
    """Experiment (null: MLFLOW_EXPERIMENT_NAME, otherwise equiloss)."""
    name: str | None = None
    """Name of the run (null: its loss and seed)."""
    tracking_uri: str | None = None
    """Server or database (null: MLFLOW_TRACKING_URI, otherwise `mlflow.db` in the sweep's
    directory, or in that of a single run)."""

    def __post_init__(self) -> None:
        _require(
            urlsplit(self.tracking_uri or "").password is None,
            "logger.mlflow.tracking_uri would be stored with its password: set "
            "MLFLOW_TRACKING_URI or MLFLOW_TRACKING_PASSWORD instead",
        )


@dataclass
class LoggerConfig:
    """Loggers beside metrics.csv, which every run writes."""

    tensorboard: bool = True
    """Write TensorBoard event files into the run directory."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)


@dataclass
class ParityConfig:
    """How often, and against what, the formulations are held to the oracle."""

    every_n_steps: int = 50
    """Check every so many steps, step 0 included (0: never)."""
    policy: str = "warn"
    """log | warn | raise: what a disagreement does."""
    formulations: list[str] = field(
        default_factory=lambda: ["softmax_nll", "log_softmax_nll", "cross_entropy"]
    )
    """Registered losses that must agree with the oracle."""

    def __post_init__(self) -> None:
        _require(
            self.every_n_steps >= 0,
            f"parity.every_n_steps must be >= 0, got {self.every_n_steps}",
        )
        choose("parity.policy", self.policy, ("log", "warn", "raise"))
        _require(
            len(set(self.formulations)) == len(self.formulations) > 0,
            f"parity.formulations needs distinct names, at least one; got {self.formulations}",
        )


@dataclass
class Config:
    """A whole run."""

    loss: Any = MISSING
    """Name and options of a registered loss; its keys come from the loss's own signature."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    task: str = "fit"
    """fit | validate | test."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    ckpt_path: str | None = None
    """Checkpoint to evaluate (task=validate or test)."""
    resume: str = "auto"
    """auto | never: continue the interrupted run that a directory holds, or refuse to touch it."""
    in_use: str = "refuse"
    """refuse | wait: what to do about a directory that another process is working on."""
    test_weights: str = "best"
    """best | last: the weights that are tested after a fit."""
    objective: str = "val/nll"
    """Metric that `train.py` returns to a sweeper."""
    progress_bar: bool = True
    """Show progress while the run goes on."""
    model_summary: bool = True
    """Print the network's layers and parameter counts."""

    def __post_init__(self) -> None:
        choose("task", self.task, TASKS)
        choose("resume", self.resume, ("auto", "never"))
        choose("in_use", self.in_use, ("refuse", "wait"))
        choose("test_weights", self.test_weights, ("best", "last"))
        names = [f"{split}/{name}" for split in ("val", "test") for name in SPLIT_METRICS]
        choose("objective", self.objective, names)
        _require(0 <= self.seed < 2**32, f"seed must lie in [0, 2**32), got {self.seed}")
        _require(
            (self.ckpt_path is None) == (self.task == "fit"),
            "ckpt_path names the checkpoint for task=validate and task=test, and only there: "
            f"task={self.task} ckpt_path={self.ckpt_path}",
        )
