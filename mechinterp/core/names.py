"""Names that people bring from transformer_lens, told in the words of selectors."""

from __future__ import annotations

import re

from mechinterp.core.sites import KINDS, Site
from mechinterp.errors import SelectorError

__all__ = ["refuse_hook_name", "site_for_hook"]

# Hook points that carry a site under another name there.
_ELSEWHERE = {
    "attn_scores": "scores",
    "result": "head_out",
    "q_input": "q_in",
    "k_input": "k_in",
    "v_input": "v_in",
    "attn_in": "resid_pre",
    "normalized": "final_norm",
}


def site_for_hook(text: str) -> str | None:
    """Which site is meant by the name of a hook point? None where it is not the name of one.

    Both the names of old (``blocks.0.attn.hook_z``) and those of bridges (``blocks.0.attn.o.hook_in``) are known.

    Examples
    --------
    >>> site_for_hook("blocks.9.attn.hook_z"), site_for_hook("hook_embed")
    ('L9.z', 'embed')
    >>> site_for_hook("blocks.3.attn.o.hook_in"), site_for_hook("L0.z")
    ('L3.z', None)
    """
    name = text.strip()
    layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    pattern = re.sub(r"\.\d+(?=\.)", ".{}", name, count=1)
    kind = next((kind for kind in KINDS.values() if kind.point == pattern), None)
    # The last word is all that tells: in which module a hook point lives has changed from version to version.
    last = re.fullmatch(r"(?:\w+\.)*hook_(\w+)", name)
    if kind is None and last is not None:
        kind = KINDS.get(_ELSEWHERE.get(last[1], last[1]))
    if kind is None or kind.per_layer is not (layer is not None):
        return None
    return str(Site(kind.name, layer))


def refuse_hook_name(term: str) -> None:
    """Say which site is meant, where a term of a selector is the name of a hook point.

    Raises
    ------
    SelectorError
        It is one.
    """
    site = site_for_hook(term)
    if site is not None:
        raise SelectorError(f"{term.strip()!r} is the name of a hook point, and sites have shorter ones. Did you mean {site!r}?")
