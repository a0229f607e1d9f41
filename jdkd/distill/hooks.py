"""Hooks that stay with the module they were registered on."""

from collections.abc import Callable
from typing import Any


class Hook:
    """A hook that copies of its module, deep copies and pickles, carry as one that does nothing.

    So a running average of a student that is being distilled holds no teacher and calls none.

    Args:
        function: what the hook calls and whose answer it gives.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    def __call__(self, *args: Any, **kwargs: Any) -> None: ...
