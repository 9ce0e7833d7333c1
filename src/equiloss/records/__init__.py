"""What a run leaves behind: its directory, results, metrics, event files and trackers."""
