"""Data: files to splits, a seed to batches, and a batch to what the network sees.

`datasets.load(config)` gives the `Splits`, `datamodule.ImageDataModule` their loaders. Nothing is
imported here, so that listing configurations does not wait for torch.
"""
