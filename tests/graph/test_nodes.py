"""Names, shapes and the fixed order of edges."""

from __future__ import annotations

import time
from types import SimpleNamespace

import networkx as nx
import pytest

from mechinterp.errors import GraphError
from mechinterp.graph import Edge, GraphShape, Node, computation_graph, parse_node, scored_edges

SMOLLM2 = GraphShape(n_layers=30, n_heads=9, n_kv_heads=3)
GPT2 = GraphShape(n_layers=12, n_heads=12, n_kv_heads=12)
SHAPES = [
    GPT2,
    SMOLLM2,
    GraphShape(n_layers=3, n_heads=4, n_kv_heads=1),
    GraphShape(n_layers=3, n_heads=4, n_kv_heads=2, parallel=True),
    GraphShape(n_layers=2, n_heads=2, attn_only=True),
    GraphShape(n_layers=1, n_heads=1, parallel=True, attn_only=True),
]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (SMOLLM2, "30 layers of 9 heads, 3 KV heads"),
        (GraphShape(n_layers=1, n_heads=1), "1 layer of 1 head"),
        (GraphShape(2, 4, parallel=True), "2 layers of 4 heads, attention and MLP in parallel"),
        (GraphShape(2, 4, attn_only=True), "2 layers of 4 heads, without MLPs"),
    ],
)
def test_shapes_are_told_in_words(shape: GraphShape, words: str) -> None:
    assert str(shape) == words
    assert eval(repr(shape)) == shape  # noqa: S307


@pytest.mark.parametrize(("shape", "count"), [(SMOLLM2, 70_651), (GPT2, 32_491)])
def test_published_sizes(shape: GraphShape, count: int) -> None:
    assert shape.n_edges == len(scored_edges(shape)) == len(set(scored_edges(shape))) == count


def test_gpt2_has_157_writers_and_445_readers() -> None:
    assert (len(GPT2.writers), len(GPT2.readers)) == (157, 445)


def test_large_graphs_are_quick() -> None:
    shape = GraphShape(n_layers=31, n_heads=9, n_kv_heads=3)
    start = time.perf_counter()
    scored_edges(shape)
    assert time.perf_counter() - start < 10.0


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_every_edge_is_written_before_it_is_read(shape: GraphShape) -> None:
    """Brute force over all pairs: writer strictly before reader, in the order of sub-layers."""
    kinds = {"kv": 0, "head": 1, "mlp": 2}

    def time_of(name: str) -> tuple[float, int]:
        kind, layer, _ = parse_node(name)
        if layer is None:
            return (-1.0, 0) if kind == "embed" else (float("inf"), 0)
        return (float(layer), 0 if shape.parallel or kind != "mlp" else kinds["mlp"])

    expected = [
        Edge(writer, reader, port)
        for reader in shape.nodes
        for port in shape.ports(reader)
        for writer in shape.nodes
        if parse_node(writer).kind in ("embed", "head", "mlp") and time_of(writer) < time_of(reader)
    ]
    assert list(scored_edges(shape)) == expected
    for edge in expected:
        shape.check(edge)


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_networkx_counts_the_same(shape: GraphShape) -> None:
    graph = computation_graph(shape)
    kinds = [kind for _, _, kind in graph.edges(data="kind")]
    assert kinds.count("scored") == shape.n_edges
    assert kinds.count("structural") == (shape.n_layers * shape.n_heads if shape.grouped else 0)
    assert tuple(graph) == shape.nodes
    assert nx.is_directed_acyclic_graph(graph)
    position = {name: i for i, name in enumerate(shape.nodes)}
    assert all(position[src] < position[dst] for src, dst in graph.edges())


def test_attributes_can_be_written_as_graphml() -> None:
    graph = computation_graph(GraphShape(n_layers=2, n_heads=2, n_kv_heads=1))
    assert graph.nodes["a1.h0"] == {"kind": "head", "layer": 1, "head": 0}
    assert graph.nodes["embed"] == {"kind": "embed"}
    assert graph.edges["embed", "a1.kv0", "k"] == {"kind": "scored", "layer": 1, "head": 0}
    assert graph.edges["a1.kv0", "a1.h1", "kv"]["kind"] == "structural"
    assert "".join(nx.generate_graphml(graph)).startswith("<graphml")


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_texts_are_read_back(shape: GraphShape) -> None:
    for edge in scored_edges(shape)[:: max(1, shape.n_edges // 500)]:
        assert Edge.parse(str(edge)) == edge
    for name in shape.nodes:
        assert str(parse_node(name)) == name


def test_edges_print_as_in_the_literature() -> None:
    assert str(Edge("a0.h1", "a3.h2", "k")) == "a0.h1->a3.h2<k>"
    assert str(Edge("m0", "logits", "in")) == "m0->logits"
    assert Edge.parse(" a0.h1 -> m3<in> ") == Edge("a0.h1", "m3", "in")
    assert parse_node("a9.kv2") == Node("kv", 9, 2)


def test_kv_nodes_and_their_heads_are_inverse() -> None:
    assert SMOLLM2.kv_node("a9.h6") == "a9.kv2"
    assert SMOLLM2.heads_of("a9.kv2") == ("a9.h6", "a9.h7", "a9.h8")
    assert GPT2.kv_node("a9.h6") is None
    assert GPT2.heads_of("a9.h6") == ()
    assert SMOLLM2.kv_node("m3") is None
    with pytest.raises(GraphError, match="has its own keys and values"):
        GPT2.heads_of("a9.kv2")


def test_ports() -> None:
    assert SMOLLM2.ports("a0.h0") == ("q",)
    assert SMOLLM2.ports("a0.kv0") == ("k", "v")
    assert GPT2.ports("a0.h0") == ("q", "k", "v")
    assert GPT2.ports("embed") == ()
    assert GPT2.ports("m0") == GPT2.ports("logits") == ("in",)


def test_shape_of_models_configs_and_circuits() -> None:
    cfg = SimpleNamespace(n_layers=30, n_heads=9, n_kv_heads=3, parallel=False, attn_only=False)
    assert GraphShape.of(cfg) == GraphShape.of(SimpleNamespace(cfg=cfg)) == SMOLLM2
    assert GraphShape.of(SMOLLM2) is SMOLLM2
    assert GraphShape.of(SimpleNamespace(shape=SMOLLM2)) is SMOLLM2
    assert GraphShape(n_layers=1, n_heads=4) == GraphShape(n_layers=1, n_heads=4, n_kv_heads=4)


MESSAGES = [
    (lambda: parse_node("h9"), "'h9' is not the name of a node. Nodes are embed, logits, a9.h6"),
    (lambda: parse_node("a٣.h1"), "is not the name of a node"),
    (lambda: Edge.parse("a0.h1"), "'a0.h1' is not an edge. Edges are written 'a0.h1->a3.h2<k>'"),
    (lambda: GraphShape.of(7), "int does not say its n_layers, n_heads, n_kv_heads. Give a loaded model"),
    (lambda: GraphShape(0, 1), "n_layers=0 is not a size. Give a whole number of at least 1."),
    (
        lambda: GraphShape(2, 9, 4),
        "9 query heads cannot share 4 KV heads evenly. n_kv_heads must divide n_heads.",
    ),
    (lambda: GPT2.parse("a12.h0"), "There is no node a12.h0: the layers are 0 to 11."),
    (lambda: GPT2.parse("a1.h12"), "There is no node a1.h12: the heads of a layer are 0 to 11."),
    (lambda: SMOLLM2.parse("a1.kv3"), "There is no node a1.kv3: the KV heads of a layer are 0 to 2."),
    (lambda: GPT2.parse("a1.kv3"), "every head has its own keys and values. Use a1.h3 with port k or v."),
    (lambda: SHAPES[4].parse("m0"), "There is no node m0: the model has no MLPs (attn_only=True)."),
    (
        lambda: check(GPT2, "a1.h0->a1.h1<q>"),
        "There is no edge a1.h0->a1.h1<q>: a1.h0 is not computed before a1.h1.",
    ),
    (lambda: check(GPT2, "m0->m1<q>"), "There is no edge m0->m1<q>: m1 has no port 'q'. There are: in."),
    (lambda: check(GPT2, "m0->embed"), "embed has no port 'in'. It reads nothing."),
    (lambda: check(GPT2, "logits->m0"), "There is no edge logits->m0: nothing comes after the logits."),
    (lambda: check(SMOLLM2, "m0->a1.h4<k>"), "the KV head reads keys and values. Use m0->a1.kv1<k>."),
    (
        lambda: check(SMOLLM2, "a1.kv0->m1"),
        "There is no edge a1.kv0->m1: a KV head writes only to its query heads.",
    ),
    (lambda: check(SMOLLM2, "a1.kv0->a1.h1<kv>"), "a1.kv0->a1.h1<kv> is structural: it is always there"),
    (lambda: check(SHAPES[3], "a1.h0->m1"), "attention and MLP of one layer run in parallel."),
]


def check(shape: GraphShape, text: str) -> None:
    shape.check(Edge.parse(text))


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[message[:40] for _, message in MESSAGES])
def test_messages(call, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        call()
    assert message in str(caught.value)
