"""Data: splits of a dataset, global batches of samples, and their preparation on the device.

`datasets.load(config)` gives the `Splits`, `datamodule.ImageDataModule` their loaders. Nothing is
imported here, so that listing configurations does not wait for torch.
"""
