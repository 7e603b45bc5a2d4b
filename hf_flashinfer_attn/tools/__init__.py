"""Command line, benchmark, demo, doctor and warmup."""
