"""Losses with one mistake each. None of them imports equiloss."""
