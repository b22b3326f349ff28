"""Evaluation: what was learned, and what was forgotten."""
