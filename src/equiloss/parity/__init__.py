"""Evidence, while a run trains, that the formulations are one function."""
