"""Networks by name: images [N, C, H, W] -> logits [N, K]."""
