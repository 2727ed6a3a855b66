"""The public surface: which names there are, that each explains itself, what importing costs and changes."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import mechinterp

ROOT = Path(__file__).parents[1]

# Adding or losing a public name is a decision: make it here as well.
PUBLIC = [
    "Ability",
    "Ablation",
    "AblationTable",
    "Add",
    "Agreement",
    "Attention",
    "Audit",
    "Cache",
    "Call",
    "Certificate",
    "Circuit",
    "CircuitRuns",
    "Clamp",
    "Completeness",
    "Diagram",
    "Edge",
    "Edit",
    "Effects",
    "Freeze",
    "Generation",
    "GraphShape",
    "HeadScores",
    "HeadStory",
    "HookRegistry",
    "HypothesisTests",
    "Mean",
    "MechInterpError",
    "Metric",
    "Model",
    "Noise",
    "Plan",
    "Project",
    "Recovery",
    "Replace",
    "Report",
    "Resample",
    "Run",
    "Scale",
    "Selection",
    "Site",
    "SizeCurve",
    "Stability",
    "SubUpdates",
    "Swap",
    "Task",
    "TopTokens",
    "TunedLens",
    "ValueVectors",
    "Verification",
    "Zero",
    "acdc",
    "attention",
    "attention_flow",
    "attention_rollout",
    "attribute",
    "audit",
    "auroc",
    "check_hypotheses",
    "check_task",
    "compare_ablations",
    "compare_to_exact",
    "compare_to_known",
    "completeness",
    "composition",
    "computation_graph",
    "copying_scores",
    "describe",
    "deviation",
    "direct_logits",
    "discover",
    "draw",
    "edge_effects",
    "edit_from_json",
    "evaluate",
    "fit_tuned_lens",
    "generate",
    "head_scores",
    "load",
    "load_mib",
    "logit_lens",
    "minimality",
    "ov_circuit",
    "patch",
    "patch_paths",
    "plan",
    "plan_edges",
    "qk_circuit",
    "random_edges",
    "run",
    "run_circuits",
    "save_mib",
    "select",
    "size_curve",
    "stability",
    "sub_updates",
    "tasks",
    "token_positions",
    "top_tokens",
    "toys",
    "value_vectors",
    "verify",
]


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_public_names_are_these() -> None:
    assert list(mechinterp.__all__) == PUBLIC


def test_all_is_sorted_and_shown() -> None:
    assert list(mechinterp.__all__) == sorted(set(mechinterp.__all__))
    assert set(mechinterp.__all__) <= set(dir(mechinterp))


def test_type_checkers_see_the_same_names() -> None:
    # The names are loaded on first use; what is written for type checkers beside it could go its own way.
    source = (ROOT / "mechinterp" / "__init__.py").read_text(encoding="utf-8")
    (block,) = (node for node in ast.parse(source).body if isinstance(node, ast.If))
    seen = {alias.asname: f"{node.module}" for node in block.body for alias in node.names}
    assert sorted(seen) == PUBLIC
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(mechinterp, name)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_explains_itself(name: str) -> None:
    value = getattr(mechinterp, name)
    doc = value.__doc__
    assert doc and doc.strip(), f"mechinterp.{name} has no docstring"
    # A dataclass without a docstring gets its own signature as one.
    assert not doc.startswith(f"{name}("), f"mechinterp.{name} has no docstring of its own"


def test_a_name_that_is_not_there_suggests_one_that_is() -> None:
    with pytest.raises(AttributeError) as caught:
        mechinterp.pach  # noqa: B018
    assert str(caught.value) == "mechinterp has no 'pach'. Did you mean 'patch' or 'Cache'?"


def test_import_is_light() -> None:
    heavy = [
        "IPython", "datasets", "gguf", "matplotlib", "pandas", "pygraphviz", "scipy", "sklearn", "tqdm",
        "transformer_lens", "transformers", "typer", "wandb",
    ]  # fmt: skip
    code = f"""
import sys, torch
had = set(sys.modules)
import mechinterp
print([name for name in {heavy} if name in sys.modules and name not in had])
"""
    assert in_a_fresh_process(code).strip() == "[]"


def test_import_takes_at_most_a_third_of_a_second_on_top_of_torch() -> None:
    code = "import time, torch; t = time.perf_counter(); import mechinterp; print(time.perf_counter() - t)"
    # The least of several: the machine may be busy with something else.
    seconds = []
    for _ in range(7):
        seconds.append(float(in_a_fresh_process(code)))
        if seconds[-1] <= 0.3:
            break
    assert min(seconds) <= 0.3, f"import mechinterp takes {min(seconds):.2f} s beside torch"


def test_import_changes_nothing() -> None:
    code = """
import json, logging, os, random, sys, threading, warnings
import numpy, torch

def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, sorted(logging.root.manager.loggerDict))]
    return {
        "excepthooks": repr((sys.excepthook, threading.excepthook, sys.displayhook)),
        "recursion limit": sys.getrecursionlimit(),
        "path": list(sys.path),
        "environment": dict(os.environ),
        "handlers": {log.name: [repr(h) for h in log.handlers] for log in loggers if log.handlers},
        "log level": logging.root.level,
        "warnings": [repr(f) for f in warnings.filters],
        "python rng": hash(random.getstate()),
        "numpy rng": numpy.random.get_state()[1].tolist(),
        "torch rng": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
    }

before = state()
import mechinterp
for name in mechinterp.__all__:
    getattr(mechinterp, name)
after = state()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""
    assert json.loads(in_a_fresh_process(code)) == []


def test_the_package_is_typed() -> None:
    assert (ROOT / "mechinterp" / "py.typed").exists()


def test_the_command_is_the_command_line() -> None:
    module, function = project()["scripts"]["mechinterp"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_exception_is_in_the_tree_of_the_docstring() -> None:
    from mechinterp import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) > 5
    for error in classes:
        assert issubclass(error, errors.MechInterpError)
        assert error.__name__ in (errors.__doc__ or "")
        # People write `except ValueError` as well.
        if error is not errors.MechInterpError:
            assert any(base.__module__ == "builtins" for base in error.__bases__)
