"""Prompts: the built-in probe and function-calling task, and how they are rendered to tokens."""
