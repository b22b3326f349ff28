"""Benchmarks that lm-eval scores on local files: what they are, and how each question is put."""
