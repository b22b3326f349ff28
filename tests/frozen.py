"""Garbage collection without what lives as long as the tests do."""

import gc


def pytest_collection_finish() -> None:
    """Imported and collected by now: half a second for every `gc.collect()`, which trainers and PEFT's tests call."""
    gc.collect()
    gc.freeze()
