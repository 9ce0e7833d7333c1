"""Side-by-side timings: `make bench`, or `make bench ARGS="loss loop"` for parts of it."""
