"""What the marks of a drawing look like: colours, widths, dashes.

Blue and vermilion are from Okabe and Ito's palette, which all common kinds of colour blindness keep apart;
for paper without colour, negative edges are dashed too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from mechinterp.graph.circuit import Circuit
from mechinterp.graph.nodes import Edge

__all__ = ["BORDER", "FAINT", "FILL", "FONT", "INK", "STRUCTURAL_LINE", "Style", "printable", "spans_in_words"]

FONT: Final = "Helvetica"
INK: Final = "#222222"
FAINT: Final = "#666666"
BORDER: Final = "#7a7f88"
FILL: Final = {"embed": "#3c4350", "logits": "#3c4350", "head": "#ffffff", "kv": "#e3e9f5", "mlp": "#f6e8c3"}

POSITIVE: Final = "#0065a8"
NEGATIVE: Final = "#d55e00"
UNSCORED: Final = "#404040"
CLIPPED_FROM: Final = 20  # edges
STRUCTURAL_LINE: Final = {"color": "#6f7680", "style": "dotted", "penwidth": "1.3", "arrowhead": "none"}


@dataclass(frozen=True)
class Style:
    """How an edge is drawn, given its score.

    The width grows with the square root of the score, so that edges a hundred times weaker can still be seen, up to
    the score of `full`. In crowded pictures the weak ones step back further.

    Parameters
    ----------
    strongest
        The largest score of the picture, by size.
    full
        The score at which the full width is reached. In all but small pictures the 98th percentile: one huge edge
        would make all others thin.
    crowded
        Whether there are many edges.
    """

    strongest: float
    full: float
    crowded: bool = False

    @classmethod
    def of(cls, circuit: Circuit) -> Style:
        """The style for a picture of this circuit."""
        sizes = sorted(abs(score) for score in circuit.scores.values() if score is not None)
        strongest = sizes[-1] if sizes else 0.0
        full = sizes[math.floor(0.98 * (len(sizes) - 1))] if len(sizes) >= CLIPPED_FROM else strongest
        return cls(strongest, full or strongest, crowded=len(circuit) > 300)

    @property
    def clipped(self) -> bool:
        """Whether an edge is visibly stronger than it is drawn."""
        return self.strongest > 1.5 * self.full

    def attributes(self, score: float | None) -> dict[str, str]:
        """Graphviz attributes of a scored edge."""
        if score is None:
            return {"color": UNSCORED, "penwidth": "1", "arrowsize": "0.5"}
        strength = math.sqrt(min(1.0, abs(score) / self.full)) if self.full else 0.0
        least = 0.25 if self.crowded else 0.5
        opacity = round(255 * (least + (1 - least) * strength))
        attributes = {
            "color": f"{NEGATIVE if score < 0 else POSITIVE}{opacity:02x}",
            "penwidth": f"{0.5 + 3.5 * strength:.2f}",
            "arrowsize": f"{0.35 + 0.3 * strength:.2f}",
        }
        return {**attributes, "style": "dashed"} if score < 0 else attributes


def spans_in_words(circuit: Circuit, edge: Edge) -> list[str]:
    """At which spans an edge carries something, the strongest first; nothing where that is everywhere."""
    spans = sorted(circuit.spans.get(edge, {}).items(), key=lambda each: -abs(each[1] or 0.0))
    return [printable(span) if score is None else f"{printable(span)}  {score:+.4g}" for span, score in spans]


def printable(text: str) -> str:
    """One line without control characters, which XML cannot hold at all."""
    return "".join(c if c.isprintable() else " " for c in text)
