"""A circuit: the edges by which a model does something, with their scores and where they came from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import networkx as nx

from mechinterp.errors import FileFormatError, GraphError, missing_extra
from mechinterp.graph.certificate import Certificate
from mechinterp.graph.files import FORMAT, VERSION, file_of, read_content, write_atomically
from mechinterp.graph.graph import build_graph, collapsed, index_of
from mechinterp.graph.neurons import as_neurons, check_same_neurons, of_both, of_either, touched
from mechinterp.graph.nodes import Edge, GraphShape, counted
from mechinterp.graph.values import as_edge, as_score, as_spans, plain_mapping, total

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Circuit"]

PICTURES: Final = (".dot", ".svg", ".png", ".pdf", ".html", ".jpg", ".jpeg")

EdgeLike = Edge | str | tuple[str, str, str]


@dataclass(frozen=True, repr=False)
class Circuit:
    """Which edges matter, how much, and who says so?

    A value: it is never changed, and what is computed from it is a new circuit.

    Parameters
    ----------
    shape
        The graph that the edges are taken from; anything `GraphShape.of` reads.
    scores
        A score per edge of the circuit, or None where an edge has none (a true circuit, a random one). An
        edge is in the circuit if it is a key here, whatever its score. Kept in the order of `scored_edges`.
    provenance
        Where it came from: ``model``, ``task``, ``method``, seed, versions, cost. Anything JSON can hold.
    report
        How good it is: numbers from an evaluation. Anything JSON can hold. See `with_report`.
    spans
        Of an edge that carries something at some positions alone: the names of these spans (``task.spans``), each with its
        score or None. An edge that is not here carries at all positions.
    neurons
        Of an MLP that keeps some of its neurons alone, ``"m3"``: their indices, each with its score or None. An MLP that is not
        here keeps all of them. The edges are those of the MLP; `mechinterp.run_circuits` says what it then writes.

    Raises
    ------
    GraphError
        If an edge does not exist in this shape, a score is not a finite number, `provenance` or `report`
        hold something that JSON cannot, or spans are given of an edge that is not in the circuit, or none of one that is;
        or neurons of an MLP that no edge touches. Which indices there are only the model knows: it is asked when they meet.

    Examples
    --------
    >>> shape = GraphShape(n_layers=2, n_heads=2)
    >>> edges = ["embed->a0.h1<v>", "a0.h1->a1.h0<k>", "a1.h0->logits", "m0->logits"]
    >>> circuit = Circuit.from_edges(shape, edges)
    >>> circuit
    Circuit: 4 edges (3 connected) of 46, 5 nodes
    >>> "a1.h0->logits" in circuit, circuit.heads()
    (True, ('a0.h1', 'a1.h0'))
    >>> (circuit - Circuit.from_edges(shape, ["m0->logits"])).n_connected
    3
    """

    shape: GraphShape
    scores: Mapping[Edge, float | None]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    spans: Mapping[Edge, Mapping[str, float | None]] = field(default_factory=dict)
    neurons: Mapping[str, Mapping[int, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = GraphShape.of(self.shape)
        index = index_of(shape)
        given = {as_edge(edge): score for edge, score in self.scores.items()}
        ordered = sorted(zip(index.positions(given), given.values(), strict=True), key=lambda pair: pair[0])
        scores = {index.edges[i]: as_score(index.edges[i], score) for i, score in ordered}
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "scores", MappingProxyType(scores))
        object.__setattr__(self, "provenance", MappingProxyType(plain_mapping(self.provenance, "provenance")))
        object.__setattr__(self, "report", MappingProxyType(plain_mapping(self.report, "report")))
        object.__setattr__(self, "spans", MappingProxyType(as_spans(self.spans, scores)))
        object.__setattr__(self, "neurons", MappingProxyType(as_neurons(self.neurons, shape, self.nodes) if self.neurons else {}))

    # --- making one

    @classmethod
    def full(cls, model: object, *, provenance: Mapping[str, Any] | None = None) -> Circuit:
        """The circuit of every edge, unscored: the whole model."""
        shape = GraphShape.of(model)
        return cls(shape, dict.fromkeys(index_of(shape).edges), provenance or {"method": "full"})

    @classmethod
    def empty(cls, model: object, *, provenance: Mapping[str, Any] | None = None) -> Circuit:
        """The circuit of no edge."""
        return cls(GraphShape.of(model), {}, provenance or {"method": "empty"})

    @classmethod
    def from_edges(
        cls,
        model: object,
        edges: Iterable[EdgeLike],
        *,
        scores: Mapping[Edge, float] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Circuit:
        """A circuit of the given edges, with those of the given scores that belong to them.

        Parameters
        ----------
        model
            A loaded model, a config, or a `GraphShape`.
        edges
            `Edge` objects, or texts as they print: ``"a0.h1->a3.h2<k>"``.
        scores
            May hold more edges than the circuit (all of the model's, say); an edge without a score gets None.
        provenance
            See `Circuit`.
        """
        known = scores or {}
        chosen = [as_edge(edge) for edge in edges]
        return cls(GraphShape.of(model), {edge: known.get(edge) for edge in chosen}, provenance or {})

    # --- what is in it

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The scored edges, in the order of `scored_edges`. Structural ones are in `graph`."""
        return tuple(self.scores)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Nodes that an edge begins or ends at, in the order of computation."""
        touched = {name for edge in self.scores for name in edge[:2]}
        return tuple(name for name in self.shape.nodes if name in touched)

    @cached_property
    def graph(self) -> nx.MultiDiGraph[str]:
        """The circuit as a networkx object, frozen: take ``circuit.graph.copy()`` to change it.

        Keyed by port. Edges carry ``kind`` (``"scored"`` or ``"structural"``), the reader's ``layer`` and
        ``head``, and ``score`` where they have one, and ``spans`` (``"S1,end"``) where they carry at some alone;
        MLPs carry ``neurons`` (``"12,40"``) where they keep some alone. Its ``graph.graph`` holds the shape.
        """
        edges: list[tuple[Edge, dict[str, object]]] = [
            (edge, {} if score is None else {"score": score}) for edge, score in self.scores.items()
        ]
        edges = [(edge, said | ({"spans": ",".join(self.spans[edge])} if edge in self.spans else {})) for edge, said in edges]
        graph = build_graph(self.shape, self.nodes, edges)
        for mlp, kept in self.neurons.items():
            graph.nodes[mlp]["neurons"] = ",".join(map(str, kept))
        return nx.freeze(graph)

    @property
    def certificate(self) -> Certificate | None:
        """What the circuit claims to be worth, and all that is needed to check it; None without an evaluation.

        Raises
        ------
        FileFormatError
            If a later version of the package wrote it.
        """
        return Certificate.read(self.report, self.provenance)

    @property
    def origin(self) -> str:
        """Task, model and method in a few words, as far as the provenance names them."""
        parts = (("task", "{}"), ("model", "on {}"), ("method", "by {}"))
        return " ".join(words.format(self.provenance[key]) for key, words in parts if self.provenance.get(key))

    def heads(self) -> tuple[str, ...]:
        """Attention heads that lie on a path from embed to logits, in the order of computation."""
        readers = {edge.src for edge in self.connected().edges}
        return tuple(name for name in self.shape.nodes if name in readers and self.shape.parse(name).kind == "head")

    def connected(self) -> Circuit:
        """The part that lies on paths from embed to logits: the rest cannot carry anything.

        A KV head conducts to all of its query heads, by structural edges. See `connected_edges_of` for what
        dropping the rest means under different ablations. Provenance and report are kept.
        """
        return self.only(self._connected)

    def only(self, edges: Iterable[EdgeLike]) -> Circuit:
        """The circuit of some of its edges, with their scores, spans and neurons; provenance and report are kept.

        Raises
        ------
        GraphError
            An edge that is not in the circuit.
        """
        kept = [as_edge(edge) for edge in edges]
        for edge in kept:
            if edge not in self.scores:
                raise GraphError(f"{edge} is not in this circuit of {counted(len(self), 'edge')}.")
        spans = {edge: self.spans[edge] for edge in kept if edge in self.spans}
        neurons = touched(self.neurons, kept)
        return replace(self, scores={edge: self.scores[edge] for edge in kept}, spans=spans, neurons=neurons)

    def everywhere(self) -> Circuit:
        """The same edges at all positions."""
        return replace(self, spans={}) if self.spans else self

    def with_neurons(self, neurons: Mapping[str, Mapping[int, float | None]] | Iterable[str]) -> Circuit:
        """The same edges, of these MLPs with these neurons alone and of all others with all; ``{}`` for whole MLPs everywhere.

        Neurons may also be given by their names, ``m0.n12`` or ``L0.N12.mlp_post``.

        Examples
        --------
        >>> circuit = Circuit.from_edges(GraphShape(n_layers=1, n_heads=1), ["embed->m0", "m0->logits"])
        >>> circuit.with_neurons(["m0.n12", "m0.n40"])
        Circuit: 2 edges (2 connected) of 8, 2 neurons of 1 MLP, 3 nodes
        """
        return replace(self, neurons=as_neurons(neurons, self.shape, self.nodes))

    @property
    def n_neurons(self) -> int:
        """How many neurons are kept in the MLPs that do not keep all of theirs."""
        return sum(map(len, self.neurons.values()))

    @property
    def n_pairs(self) -> int:
        """The number of pairs of edge and span; an edge that carries at all positions is one."""
        return len(self) - len(self.spans) + sum(map(len, self.spans.values()))

    @cached_property
    def _connected(self) -> tuple[Edge, ...]:
        index = index_of(self.shape)
        # An MLP without a neuron passes nothing on.
        able = (edge for edge in self.scores if self.neurons.get(edge.src, True))
        return tuple(index.edges[i] for i in index.connected(index.positions(able)))

    @property
    def n_connected(self) -> int:
        """The number of edges on some path from embed to logits; compare circuits at equal ones."""
        return len(self._connected)

    def __len__(self) -> int:
        return len(self.scores)

    def __bool__(self) -> bool:
        # An empty circuit is a circuit: `if circuit` must not ask for its size.
        return True

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.scores)

    def __contains__(self, edge: object) -> bool:
        return as_edge(edge) in self.scores if isinstance(edge, str | tuple) else False

    # --- comparing

    def __or__(self, other: Circuit) -> Circuit:
        """Edges of either, each at the spans of either, and the neurons of either; of two scores the left one's."""
        self._check_same_shape(other)
        # What carries everywhere in one of them does so in both together, and what is whole in one of them is whole.
        spans = of_either(self.spans, other.spans, self.scores, other.scores)
        neurons = of_either(self.neurons, other.neurons, self.nodes, other.nodes)
        return self._combined("union", other, {**other.scores, **self.scores}, spans, neurons)

    def __and__(self, other: Circuit) -> Circuit:
        """Edges of both, at the spans of both, and the neurons of both, with the left one's scores.

        An edge goes where there is no span left of it, or no neuron of an MLP at its end.
        """
        self._check_same_shape(other)
        spans = of_both(self.spans, other.spans, self.scores.keys() & other.scores.keys())
        neurons = of_both(self.neurons, other.neurons, {*self.nodes} & {*other.nodes})
        kept = {
            e: s
            for e, s in self.scores.items()
            if e in other.scores and spans.get(e, True) and all(neurons.get(end, True) for end in e[:2])
        }
        return self._combined("intersection", other, kept, {e: spans[e] for e in kept if e in spans}, neurons)

    def __sub__(self, other: Circuit) -> Circuit:
        """Edges of the left one alone, and the spans of the left one alone where both have an edge; with the left one's neurons.

        Raises
        ------
        GraphError
            An edge is everywhere in the left one and at some spans in the right one: which others there are it does not say. Or
            an MLP of an edge of both has neurons in the left one alone: what is left of that edge is no edge of a circuit.
        """
        self._check_same_shape(other)
        self._check_same_grain(other, only_left=True)
        left: dict[Edge, Mapping[str, float | None]] = {}
        for edge, spans in self.spans.items():
            gone = other.spans.get(edge, spans if edge in other.scores else {})
            left[edge] = {span: score for span, score in spans.items() if span not in gone}
        kept = {e: s for e, s in self.scores.items() if left.get(e, e not in other.scores)}
        return self._combined("difference", other, kept, {e: spans for e, spans in left.items() if spans}, self.neurons)

    def iou(self, other: Circuit) -> float:
        """How much do two circuits agree? Edges of both, over edges of either; 1.0 for two empty ones.

        Of edges with spans it is the pairs of edge and span that count. Neurons count beside the edges, one each.

        Raises
        ------
        GraphError
            An edge is everywhere in one and at some spans in the other, or an MLP is whole in one and not in the other.
        """
        self._check_same_shape(other)
        self._check_same_grain(other)
        mine, theirs = self._members, other._members
        either = len(mine | theirs)
        return len(mine & theirs) / either if either else 1.0

    @cached_property
    def _members(self) -> frozenset[tuple[Edge | str, str | int | None]]:
        """Edges with their spans, None for everywhere; MLPs with their neurons."""
        pairs = {(edge, span) for edge in self.scores for span in self.spans.get(edge, (None,))}
        return frozenset(pairs | {(mlp, neuron) for mlp, kept in self.neurons.items() for neuron in kept})

    def _combined(
        self,
        operation: str,
        other: Circuit,
        scores: Mapping[Edge, float | None],
        spans: Mapping[Edge, Mapping[str, float | None]],
        neurons: Mapping[str, Mapping[int, float | None]],
    ) -> Circuit:
        sources = {"left": self.provenance, "right": other.provenance}
        # The score of an edge at some of its spans is the sum of theirs.
        scores = {edge: total(spans.get(edge, {}).values(), score) for edge, score in scores.items()}
        return Circuit(self.shape, scores, {"method": operation, **sources}, spans=spans, neurons=touched(neurons, scores))

    def _check_same_grain(self, other: Circuit, *, only_left: bool = False) -> None:
        shared = [edge for edge in self.scores if edge in other.scores]
        for edge in shared:
            if (edge in self.spans) != (edge in other.spans) and not (only_left and edge in self.spans):
                raise GraphError(
                    f"{edge} is at all positions in one of these circuits and at some spans in the other, and which spans there "
                    "are is not known here. Compare the edges alone: circuit.everywhere()."
                )
        ends = {end for edge in shared for end in edge[:2]} if only_left else {*self.nodes} & {*other.nodes}
        check_same_neurons(self.neurons, other.neurons, ends, only_left=only_left)

    def _check_same_shape(self, other: Circuit) -> None:
        if self.shape != other.shape:
            raise GraphError(
                f"These circuits are of different models: one of {self.shape}, and one of {other.shape}. "
                "Only circuits of one shape can be combined or compared."
            )

    def __hash__(self) -> int:
        return hash((self.shape, self.edges))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mappingproxy can be neither copied nor pickled.
        spans, neurons = ({key: dict(scores) for key, scores in each.items()} for each in (self.spans, self.neurons))
        return Circuit, (self.shape, dict(self.scores), dict(self.provenance), dict(self.report), spans, neurons)

    # --- taking it elsewhere

    def with_report(self, report: object) -> Circuit:
        """The same circuit with an evaluation's numbers, which are saved with it: `mechinterp.evaluate`'s report, or its data.

        Raises
        ------
        GraphError
            Neither a mapping, nor anything that has ``to_json()``.
        """
        # Asked by what it has: graphs know no evaluation.
        to_json = getattr(report, "to_json", None)
        told = to_json() if callable(to_json) and not isinstance(report, type) else report
        if not isinstance(told, Mapping):
            raise GraphError(
                f"a {type(report).__name__} was given as a report: report = mi.evaluate(circuit, model, task, seed=0), "
                "then circuit.with_report(report)"
            )
        return replace(self, report=told)

    def collapse(self) -> nx.DiGraph[str]:
        """The circuit as a plain DiGraph: parallel edges at different ports become one.

        An edge has ``ports`` (``"k,v"``), ``kind``, and where any of them is scored ``score`` (the sum: ports
        that push in opposite directions cancel) and ``weight`` (the sum of absolute values: they do not). A
        new object.
        """
        return collapsed(self.graph)

    def to_frame(self) -> pd.DataFrame:
        """A table of the scored edges with the columns ``src dst port value``; needs pandas.

        With spans there is a row for each pair and a column ``span``, empty for everywhere.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise missing_extra("a table", "pandas", "frames") from error
        every = ((edge, self.spans.get(edge, {None: score})) for edge, score in self.scores.items())
        rows = [(*edge, span, math.nan if score is None else score) for edge, at in every for span, score in at.items()]
        frame = pd.DataFrame(rows, columns=["src", "dst", "port", "span", "value"]).astype({"value": "float64"})
        return frame if self.spans else frame.drop(columns="span")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the circuit as JSON, one line per edge; folders are made, an old file is replaced at once.

        Scores, provenance and report come back from `load` as they were, bit for bit.

        Raises
        ------
        FileFormatError
            If the name ends like a picture.
        """
        target = Path(path)
        if target.suffix.lower() in PICTURES:
            raise FileFormatError(
                f"{target.name!r} ends like a picture, and a circuit is saved as JSON. "
                f"For the picture: mi.draw(circuit).save({target.name!r})"
            )
        content = {
            "format": FORMAT,
            # As old a version as can say it: more can read that.
            "version": VERSION if self.neurons else 2 if self.spans else 1,
            "shape": {f.name: getattr(self.shape, f.name) for f in fields(self.shape)},
            "provenance": dict(self.provenance),
            "report": dict(self.report),
            "edges": {str(edge): score for edge, score in self.scores.items()},
        }
        if self.spans:
            content["spans"] = {str(edge): dict(scores) for edge, scores in self.spans.items()}
        if self.neurons:
            content["neurons"] = {mlp: dict(scores) for mlp, scores in self.neurons.items()}
        write_atomically(target, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """Read a circuit that `save` wrote.

        Raises
        ------
        FileFormatError
            If the file is not a circuit, was written by a later version, or does not fit its own shape; or a
            folder without ``circuit.json``. A folder with one stands for that file.
        FileNotFoundError
            If there is no such file.
        """
        content = read_content(file_of(Path(path)))
        try:
            shape = GraphShape(**content["shape"])
            edges = {Edge.parse(text): as_score(text, score) for text, score in content["edges"].items()}
            said = {key: plain_mapping(content.get(key, {}), key) for key in ("provenance", "report")}
            spans = {Edge.parse(text): scores for text, scores in content.get("spans", {}).items()}
            neurons = {mlp: {int(i): s for i, s in scores.items()} for mlp, scores in content.get("neurons", {}).items()}
            return cls(shape, edges, **said, spans=spans, neurons=neurons)
        except (KeyError, TypeError, ValueError, AttributeError, GraphError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise FileFormatError(f"{path} is a circuit file, but a broken one: {reason}") from error

    # --- showing it

    def __repr__(self) -> str:
        edges = f"{counted(len(self), 'edge')} ({self.n_connected} connected) of {self.shape.n_edges}"
        at = f", {counted(self.n_pairs, 'pair')} of edge and span" if self.spans else ""
        at += f", {counted(self.n_neurons, 'neuron')} of {counted(len(self.neurons), 'MLP')}" if self.neurons else ""
        return f"Circuit: {edges}{at}, {counted(len(self.nodes), 'node')}" + (f", {self.origin}" if self.origin else "")

    def _repr_svg_(self) -> str | None:
        # Imported here because drawing builds on circuits.
        from mechinterp.graph.draw import draw

        return draw(self)._repr_svg_()
