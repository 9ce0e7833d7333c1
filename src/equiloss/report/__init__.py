"""`equiloss report`: what runs have in common, in what they differ, and whether they match.

Reads what runs left behind (configurations, results, metrics), and nothing of torch.
"""
