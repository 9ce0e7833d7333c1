"""`equiloss verify invariance`: the guarantee of the README, measured on real processes.

Each part is a module with a `measure` that returns tables of figures, each with its bound.
"""
