"""Losses beside the three formulations of cross-entropy."""
