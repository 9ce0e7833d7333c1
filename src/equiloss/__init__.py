"""Image classification in which the loss is a plugin and "it is the same number" is a guarantee."""
