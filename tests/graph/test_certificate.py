"""What a circuit's file claims: read from it, kept in it, refused where it is newer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mechinterp.errors import FileFormatError, GraphError
from mechinterp.graph import Circuit, GraphShape
from mechinterp.graph.certificate import VERSION

SHAPE = GraphShape(n_layers=2, n_heads=2)
REPORT: dict[str, Any] = {
    "task": "ioi",
    "model": "m",
    "metric": "kl",
    "ablation": "zero",
    "prompts": 7,
    "seed": 3,
    "faithfulness": 0.5,
    "faithfulness_interval": [0.25, 0.75],
    "random_faithfulness": [0.0, 0.1],
    "beats_random": 2,
    "task_provenance": {"generator": "ioi", "n": 7},
    "command": ["mechinterp", "discover", "a b"],
    "caveats": ["few"],
    "further": {},
    "version": VERSION,
}


def test_it_travels_in_the_file(tmp_path: Path) -> None:
    circuit = Circuit.from_edges(SHAPE, ["embed->logits"]).with_report(REPORT)
    again = Circuit.load(circuit.save(tmp_path / "c.json"))
    assert again.certificate == circuit.certificate
    found = again.certificate
    assert found is not None
    assert (found.model, found.task, found.metric, found.ablation, found.seed) == ("m", "ioi", "kl", "zero", 3)
    assert dict(found.prompts) == {"generator": "ioi", "n": 7}
    assert found.random_circuits == 2 and found.command == ("mechinterp", "discover", "a b")
    assert "further" not in found.claims and found.claims["prompts"] == 7
    assert repr(found) == (
        "Certificate: ioi on m, 7 prompts, zero ablation, kl\n"
        "  faithfulness 0.500 (95% interval 0.250 to 0.750), 2 of 2 random circuits beaten\n"
        "  made by: mechinterp discover 'a b'\n"
        "  caution: few"
    )


def test_a_circuit_without_an_evaluation_has_none() -> None:
    circuit = Circuit.from_edges(SHAPE, ["embed->logits"])
    assert circuit.certificate is None
    assert circuit.with_report({"faithfulness": 0.9}).certificate is None


@pytest.mark.parametrize(("given", "name"), [(0.9, "float"), ("report.json", "str"), (None, "NoneType")])
def test_what_is_no_report(given: object, name: str) -> None:
    with pytest.raises(GraphError) as caught:
        Circuit.from_edges(SHAPE, ["embed->logits"]).with_report(given)
    assert str(caught.value) == (
        f"a {name} was given as a report: report = mi.evaluate(circuit, model, task, seed=0), then circuit.with_report(report)"
    )


def test_the_first_version_judged_on_the_other_half() -> None:
    old = {key: value for key, value in REPORT.items() if key not in ("version", "task_provenance", "command")}
    origin = {"task_provenance": {"generator": "ioi", "split_seed": 0, "split": "found_on"}}
    circuit = Circuit.from_edges(SHAPE, ["embed->logits"], provenance=origin).with_report(old)
    assert circuit.certificate is not None
    assert circuit.certificate.version == 1 and circuit.certificate.prompts["split"] == "held_out"


@pytest.mark.parametrize("version", [VERSION + 1, "2"])
def test_a_later_version_is_refused(version: Any) -> None:
    circuit = Circuit.from_edges(SHAPE, ["embed->logits"]).with_report(REPORT | {"version": version})
    with pytest.raises(FileFormatError, match=f"report is of version {version!r}; this mechinterp reads versions 1 to {VERSION}"):
        _ = circuit.certificate
