"""From a command line to runs: sweeps, ranks, claims on directories, exit codes."""
