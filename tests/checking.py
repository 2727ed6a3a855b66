"""Types checked at every call: what the import hook of jaxtyping puts around each function of the package, made quick."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import typing
from types import SimpleNamespace
from typing import Any

import jaxtyping
from beartype import beartype


def checked(thing: Any = None, *, jaxtyped: Any = jaxtyping.jaxtyped, **options: Any) -> Any:
    """As ``jaxtyped``, at less than half of the suite's time.

    Only modules with words for axes need it; of all others the plain types are checked. Functions inside of functions stay as
    they are: their checks would be compiled again whenever the outer function is called.
    """
    if thing is None:
        return functools.partial(checked, **options)
    if "<locals>" in thing.__qualname__:
        return thing
    there = vars(sys.modules[thing.__module__]).values()
    if any(isinstance(each, type) and issubclass(each, jaxtyping.AbstractArray) for each in there):
        return jaxtyped(thing, **options)
    if not isinstance(thing, type):
        return _switched(thing)
    if dataclasses.is_dataclass(thing):
        thing.__init__ = _switched(thing.__init__)
    return thing


def _switched(function: Any) -> Any:
    """With its types checked, unless jaxtyping is told not to."""

    @functools.cache
    def typed() -> Any:
        # At the first call, when all that the module defines is there; what only type checkers know is not checked.
        known = {}
        for name, hint in function.__annotations__.items():
            with contextlib.suppress(Exception):
                alone = SimpleNamespace(__annotations__={name: hint})
                known |= typing.get_type_hints(alone, function.__globals__, include_extras=True)
        function.__annotations__ = known
        return beartype(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else typed())(*args, **kwargs)

    return call
