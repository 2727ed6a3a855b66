"""A given number of *connected* edges, the best-ranked ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mechinterp.graph.graph import EdgeIndex

__all__ = ["best_connected"]


def best_connected(index: EdgeIndex, ranked: Sequence[int], n: int) -> tuple[int, list[int]]:
    """n connected edges from a ranking, best first: (how many were looked at, their positions in order).

    The shortest beginning of the ranking is taken whose connected part has at least n edges. It can have many
    more, where the last edge joins two large parts; then the worst edges are removed, each with all that
    hangs on it alone, passing over those whose removal would leave fewer than n. The result has n edges, or a
    few more where no single removal is small enough, or fewer where the whole ranking has not that many.
    """
    if n == 0 or not ranked:
        return 0, []
    low, high = min(n, len(ranked)), min(n, len(ranked))
    while high < len(ranked) and len(index.connected(ranked[:high])) < n:
        low, high = high + 1, min(high * 2, len(ranked))
    # The connected part only grows with the beginning, so bisection is right.
    while low < high:
        middle = (low + high) // 2
        if len(index.connected(ranked[:middle])) < n:
            low = middle + 1
        else:
            high = middle
    connected = index.connected(ranked[:low])
    if len(connected) > n:
        members = set(connected)
        connected = trimmed(index, [edge for edge in ranked[:low] if edge in members], n)
    return low, connected


def trimmed(index: EdgeIndex, ranked: Sequence[int], n: int) -> list[int]:
    """Remove the worst of these connected edges until n are left, keeping the others connected.

    In an acyclic graph all edges are connected as long as every node that writes hears something, and every
    node that is written to is heard, so removing an edge only asks for counts at its two ends. Structural
    edges count as links here, and are not among the n.
    """
    links = {edge: (index.src[edge], index.dst[edge]) for edge in ranked}
    writers = {src for src, _ in links.values()}
    # A KV head's link to a query head that writes nothing would lead nowhere. Structural links have
    # negative keys.
    for kv_head, heads in index.heads_of.items():
        if any(dst == kv_head for _, dst in links.values()):
            links |= {-1 - head: (kv_head, head) for head in heads if head in writers}
    into: dict[int, list[int]] = {}
    out_of: dict[int, list[int]] = {}
    for link, (src, dst) in links.items():
        out_of.setdefault(src, []).append(link)
        into.setdefault(dst, []).append(link)
    n_in = Counter({node: len(members) for node, members in into.items()})
    n_out = Counter({node: len(members) for node, members in out_of.items()})
    alive = set(links)
    excess = len(ranked) - n

    for worst in reversed(ranked):
        if excess == 0:
            break
        if worst not in alive:
            continue
        falling, waiting = {worst}, [worst]
        lost_in: Counter[int] = Counter()
        lost_out: Counter[int] = Counter()
        n_falling = 0
        while waiting and n_falling <= excess:
            link = waiting.pop()
            n_falling += link >= 0
            src, dst = links[link]
            lost_out[src] += 1
            lost_in[dst] += 1
            hanging: list[int] = []
            if lost_in[dst] == n_in[dst]:
                hanging += out_of.get(dst, ())
            if lost_out[src] == n_out[src]:
                hanging += into.get(src, ())
            fresh = [other for other in hanging if other in alive and other not in falling]
            falling.update(fresh)
            waiting += fresh
        if n_falling <= excess:
            alive -= falling
            n_in -= lost_in
            n_out -= lost_out
            excess -= n_falling
    return sorted(edge for edge in alive if edge >= 0)
