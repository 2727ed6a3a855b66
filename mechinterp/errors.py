"""Every exception that the package raises.

::

    MechInterpError
    ├── SiteError (KeyError)          an activation that this model does not have, or that cannot be edited
    ├── SelectorError (ValueError)    a pattern that cannot be read, or that selects nothing
    ├── EditError (ValueError)        an edit of the wrong shape, dtype or device; edits that conflict
    ├── InertError (RuntimeError)     a hook that did not fire as often as it had to
    ├── ModelError (ValueError)       a model that cannot be loaded, or is not of a supported shape
    ├── TaskError (ValueError)        prompts that do not align, answers that are not single tokens
    ├── MetricError (ValueError)      a metric of the wrong shape, or undefined where it is asked for
    ├── GraphError (ValueError)       a node or edge that the computation graph does not have
    ├── FileFormatError (ValueError)  a file that is not what its name says, or of another version
    └── MissingExtraError (ImportError)  an optional dependency that is not installed

Each one also inherits the builtin exception that people expect, so ``except KeyError`` and
``except MechInterpError`` both work. A message says what was asked, what there is, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "EditError",
    "FileFormatError",
    "GraphError",
    "InertError",
    "MechInterpError",
    "MetricError",
    "MissingExtraError",
    "ModelError",
    "SelectorError",
    "SiteError",
    "TaskError",
    "did_you_mean",
    "missing_extra",
]


class MechInterpError(Exception):
    """Base of every error that `mechinterp` raises on purpose."""

    # KeyError quotes its message with repr(); people should read it as it was written.
    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class SiteError(MechInterpError, KeyError):
    """An activation that this model does not have, or that cannot be edited on it."""


class SelectorError(MechInterpError, ValueError):
    """A pattern that cannot be read, or that selects nothing."""


class EditError(MechInterpError, ValueError):
    """An edit of the wrong shape, dtype or device, or edits that conflict."""


class InertError(MechInterpError, RuntimeError):
    """A hook that did not fire as often as it had to."""


class ModelError(MechInterpError, ValueError):
    """A model that cannot be loaded, or is not of a supported shape."""


class TaskError(MechInterpError, ValueError):
    """Prompts that do not align, or answers that are not single tokens."""


class MetricError(MechInterpError, ValueError):
    """A metric of the wrong shape, or undefined where it is asked for."""


class GraphError(MechInterpError, ValueError):
    """A node or edge that the computation graph does not have."""


class FileFormatError(MechInterpError, ValueError):
    """A file that is not what its name says, or of another version."""


class MissingExtraError(MechInterpError, ImportError):
    """An optional dependency that is not installed."""


def did_you_mean(asked: object, known: Iterable[object], *, limit: int = 3) -> str:
    """The nearest known names as a sentence, or all of them when there are few.

    Examples
    --------
    >>> did_you_mean("logit_dif", ["logit_diff", "kl"])
    "Did you mean 'logit_diff'?"
    >>> did_you_mean("x", ["alpha", "beta"])
    'There are: alpha, beta.'
    """
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(asked), names, n=limit, cutoff=0.6)
    if near:
        return "Did you mean " + " or ".join(repr(name) for name in near) + "?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else ".")
    return f"There are: {shown}" if names else "There are none."


def missing_extra(what: str, package: str, extra: str) -> MissingExtraError:
    """The error for an optional dependency that is not there, with the command that installs it.

    Examples
    --------
    >>> print(missing_extra("drawing a circuit", "pygraphviz", "draw"))
    drawing a circuit needs pygraphviz. Run: pip install 'mechinterp-hooks[draw]'
    """
    return MissingExtraError(f"{what} needs {package}. Run: pip install 'mechinterp-hooks[{extra}]'")
