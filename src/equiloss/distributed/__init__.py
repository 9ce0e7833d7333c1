"""Ranks: who is one, how a group of them comes about, and what they do together."""
