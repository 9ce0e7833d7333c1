"""A run's records: its directory, results, metrics, event files and trackers."""
