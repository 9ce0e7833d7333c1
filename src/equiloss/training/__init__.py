"""The Lightning side of a run: the module, its step, metrics, checkpoints and Trainer."""
