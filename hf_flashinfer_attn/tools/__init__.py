"""Command line: `bench`, `demo`, `doctor` and `warmup`."""
