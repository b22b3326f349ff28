"""Hooks that are gone when the block ends, whatever happens in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import nn

Hook = tuple[nn.Module, Literal["before", "after"], Callable[..., Any]]
"""A module, when the hook runs, and the hook: `before` takes (module, args, kwargs), `after` (module, args, output)."""


@contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """Register forward hooks for the length of a block."""
    with ExitStack() as stack:
        for module, when, hook in hooks:
            handle = (
                module.register_forward_pre_hook(hook, with_kwargs=True)
                if when == "before"
                else module.register_forward_hook(hook)
            )
            stack.callback(handle.remove)
        yield
