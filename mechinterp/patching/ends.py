"""Positions that are another number in each prompt: from the end, where every prompt has an end of its own, and of tokens."""

from __future__ import annotations

from dataclasses import replace

from mechinterp.core.model import Model
from mechinterp.core.select import Selection, is_token_text, select
from mechinterp.core.sites import Site
from mechinterp.core.tokens import token_positions
from mechinterp.errors import SelectorError
from mechinterp.tasks import Task

__all__ = ["own_ends"]


def own_ends(model: Model, at: str | Site | Selection, task: Task) -> tuple[str | Site | Selection, Task]:
    """The same sites; positions that differ from prompt to prompt are named positions of the task.

    Where prompts differ in length, ``[-1]`` is ``last`` and ``[-2]`` ``last-1``. The text of a token is where it stands in the
    clean prompts.

    Raises
    ------
    SelectorError
        A prompt has no such position; or the task has one of that name already.
    """
    lengths = task.lengths
    sites = select(at, model.cfg).sites
    texts = dict.fromkeys(site.pos for site in sites if isinstance(site.pos, str) and is_token_text(site.pos))
    if texts:
        found = token_positions(model, task.clean, task.positions)
        task = replace(task, positions={**task.positions, **{text: found[text] for text in texts}})
    numbers = sorted({site.pos for site in sites if isinstance(site.pos, int)})
    if not numbers or int(lengths.min()) == task.clean.shape[1]:
        return at, task
    for pos in numbers:
        missing = (lengths < (-pos if pos < 0 else pos + 1)).nonzero().flatten().tolist()
        if missing:
            raise SelectorError(
                f"there is no position {pos} in prompt {missing[0]} of task {task.name!r}, which has {int(lengths[missing[0]])} "
                "tokens; leave the prompt out, or give each prompt its own position by a name"
            )
    names = {pos: "last" if pos == -1 else f"last{pos + 1}" for pos in numbers if pos < 0}
    taken = sorted(set(names.values()) & set(task.positions))
    if taken:
        raise SelectorError(f"task {task.name!r} has a position named {taken[0]!r}; say it by that name, or rename it")
    named = [site.at(names[site.pos]) if isinstance(site.pos, int) and site.pos < 0 else site for site in sites]
    ends = {name: lengths + pos for pos, name in names.items()}
    return Selection(tuple(named)), replace(task, positions={**task.positions, **ends})
