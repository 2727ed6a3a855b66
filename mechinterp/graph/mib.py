"""Circuit files of the Mechanistic Interpretability Benchmark, which EAP-IG writes as well: read and written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mechinterp.errors import FileFormatError, GraphError
from mechinterp.graph.checks import check_everywhere
from mechinterp.graph.circuit import Circuit
from mechinterp.graph.files import write_atomically
from mechinterp.graph.graph import scored_edges
from mechinterp.graph.nodes import Edge, GraphShape

__all__ = ["load_mib", "save_mib"]

INPUT = "input"  # their name of the embedding


def load_mib(
    path: str | os.PathLike[str], *, n_kv_heads: int | None = None, edges: Literal["in_graph", "all"] = "in_graph"
) -> Circuit:
    """Which circuit does a MIB file hold?

    The format is JSON: ``cfg`` (n_layers, n_heads, parallel_attn_mlp, d_model), ``nodes`` (name to in_graph) and ``edges`` (name
    such as ``"input->a0.h1<q>"``, ``"a0.h1->m2"``, ``"m2->logits"`` to score and in_graph).

    Parameters
    ----------
    path
        The file.
    n_kv_heads
        Of a model with grouped queries, whose file gives every query head keys and values of its own. Here they belong to the KV
        head: it is read if one of its query heads reads, and its score is the sum of theirs. Default: what the file says, if
        `save_mib` wrote it, else as many as heads.
    edges
        ``"all"``: every edge that the file scores, in the circuit or not, for `mechinterp.size_curve`.

    Returns
    -------
    Circuit
        With scores; a score that is no finite number is none.

    Raises
    ------
    FileFormatError
        No such JSON, or an edge that a model of these sizes does not have.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{file} is not JSON ({error}). A MIB circuit is what Graph.to_json() of EAP-IG writes") from error
    if not isinstance(content, dict) or any(not isinstance(content.get(key), dict) for key in ("cfg", "nodes", "edges")):
        raise FileFormatError(f"{file} is not a MIB circuit: it lacks one of cfg, nodes, edges")
    cfg: Mapping[str, Any] = content["cfg"]
    try:
        kv_heads = cfg.get("n_kv_heads", cfg["n_heads"]) if n_kv_heads is None else n_kv_heads
        shape = GraphShape(cfg["n_layers"], cfg["n_heads"], kv_heads, parallel=bool(cfg.get("parallel_attn_mlp", False)))
        scores: dict[Edge, float | None] = {}
        for name, said in content["edges"].items():
            if edges == "all" or said["in_graph"]:
                edge = _ours(name, shape)
                shape.check(edge)
                score = said.get("score")
                value = float(score) if score is not None and math.isfinite(score) else None
                known = scores.get(edge)
                scores[edge] = known if value is None else value + (known or 0.0)
    except (KeyError, TypeError, AttributeError, GraphError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise FileFormatError(f"{file} is a MIB circuit, but a broken one: {reason}") from error
    return Circuit(shape, scores, {"method": "read from a MIB file", "file": file.name})


def save_mib(circuit: Circuit, path: str | os.PathLike[str], *, d_model: int, scores: Mapping[Edge, float] | None = None) -> Path:
    """Write a circuit as the Mechanistic Interpretability Benchmark reads it.

    Parameters
    ----------
    circuit
        Its edges are ``in_graph``; nodes are where one of their edges is.
    path
        A ``.json`` file.
    d_model
        Of the model; the format asks for it.
    scores
        Of edges outside of the circuit as well, which MIB's own curve over sizes ranks; edges without a score are written with 0.
        Of a KV head's edge every one of its query heads gets an equal part.

    Raises
    ------
    GraphError
        A model without MLPs, or a circuit with spans or neurons, which the format cannot say.
    """
    check_everywhere(circuit, "A MIB file")
    shape = circuit.shape
    if shape.attn_only:
        raise GraphError("MIB files have an MLP in every layer, and this circuit is of a model without MLPs")
    known = {**(scores or {}), **{edge: score for edge, score in circuit.scores.items() if score is not None}}
    cfg = {
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "parallel_attn_mlp": shape.parallel,
        "d_model": d_model,
    } | ({"n_kv_heads": shape.n_kv_heads} if shape.grouped else {})
    inside = {name for edge in circuit for end in edge[:2] for name in (shape.heads_of(end) or (end,))}
    names = [name for name in shape.nodes if shape.parse(name).kind != "kv"]
    nodes = {_theirs(name): {"in_graph": name in inside or name == "logits"} for name in names}
    edges = {}
    for edge in scored_edges(shape):
        readers = shape.heads_of(edge.dst) or (edge.dst,)
        for reader in readers:
            port = "" if edge.port == "in" else f"<{edge.port}>"
            edges[f"{_theirs(edge.src)}->{reader}{port}"] = {
                "score": known.get(edge, 0.0) / len(readers),
                "in_graph": edge in circuit.scores,
            }
    target = Path(path)
    write_atomically(target, (json.dumps({"cfg": cfg, "nodes": nodes, "edges": edges}) + "\n").encode())
    return target


def _theirs(name: str) -> str:
    return INPUT if name == "embed" else name


def _ours(name: str, shape: GraphShape) -> Edge:
    src, dst, port = Edge.parse(name)
    if port in ("k", "v"):
        dst = shape.kv_node(dst) or dst
    return Edge("embed" if src == INPUT else src, dst, port)
