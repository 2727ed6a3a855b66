"""The layers and the manners of the package, read from its source. Each rule is shown to bite at the end."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mechinterp"

# A part may import parts of lower layers and itself, never its siblings. Only the top layer may import all.
LAYERS = {
    "errors": 0,
    "shapes": 0,
    "core": 1,
    "tasks": 1,
    "graph": 1,
    "lens": 2,
    "patching": 2,
    "discovery": 3,
    "toys": 4,
    "asking": 4,
    "verifying": 4,
    "zoo": 4,
    "cli": 4,
    "__init__": 4,
    "__main__": 4,
}
TOP = max(LAYERS.values())

# What an island must not know, wherever in a file it is imported.
FORBIDDEN = {
    "graph": {"torch", "transformers", "transformer_lens", "jaxtyping"},
    "core": {"networkx", "pygraphviz"},
    "tasks": {"networkx", "pygraphviz", "transformer_lens"},
}
# Slow to import: only inside the functions that need them.
HEAVY = {
    "IPython", "gguf", "matplotlib", "pandas", "pygraphviz", "scipy", "sklearn", "tqdm", "transformer_lens",
    "transformers", "typer",
}  # fmt: skip
MAX_LINES = 500


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: str  # relative to the package: "core/hooks.py"
    text: str

    @property
    def part(self) -> str:
        return Path(self.path).parts[0].removesuffix(".py")

    @property
    def module(self) -> str:
        parts = Path(self.path).with_suffix("").parts
        return ".".join(("mechinterp", *(part for part in parts if part != "__init__")))

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 0)}: {what}"


def sources() -> list[Source]:
    return [
        Source(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
    ]


# -- what a file says ----------------------------------------------------------------------------


def imports(source: Source, nodes: Iterable[ast.AST] | None = None) -> Iterator[tuple[ast.AST, str]]:
    """Every module imported: also inside functions, for type checkers only, or by its name as a string."""
    for node in source.nodes if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.module.split(".")
                if not source.path.endswith("__init__.py"):
                    package = package[:-1]
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            # `from mechinterp import core` imports mechinterp.core
            if base == "mechinterp":
                yield from ((node, f"mechinterp.{alias.name}") for alias in node.names)
            else:
                yield node, base
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node, name.value


def eager(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs on import: everything outside functions and outside ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from eager(node)


def called(node: ast.Call) -> str:
    """The last word of what is called."""
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def dotted(node: ast.AST) -> str:
    """``torch.cuda.is_available`` of such an expression, else the empty string."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            base = dotted(value)
            return f"{base}.{attr}" if base else ""
    return ""


def strings(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every string that the program uses; docstrings are for people."""
    docs = {
        id(node.body[0].value)
        for node in source.nodes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in source.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node, node.value


# -- the rules -----------------------------------------------------------------------------------


def layers(source: Source) -> Iterator[str]:
    """Dependencies point downwards."""
    own = LAYERS.get(source.part)
    if own is None:
        yield f"{source.path}: '{source.part}' has no layer; say in LAYERS where it belongs"
        return
    for node, name in imports(source):
        if name.split(".")[0] != "mechinterp":
            continue
        part = [*name.split("."), "__init__"][1]
        # A name of the flat namespace is the top layer.
        layer = LAYERS.get(part, TOP)
        if own < TOP and part != source.part and layer >= own:
            yield source.at(node, f"{source.part} (layer {own}) imports {name} (layer {layer})")


def islands(source: Source) -> Iterator[str]:
    """graph knows no torch, core and tasks no networkx."""
    for node, name in imports(source):
        if name.split(".")[0] in FORBIDDEN.get(source.part, ()) or (source.part, name) == (
            "graph",
            "mechinterp.shapes",
        ):
            yield source.at(node, f"{source.part} imports {name}")


def light(source: Source) -> Iterator[str]:
    """Nothing slow is imported before it is needed."""
    for node, name in imports(source, eager(source.tree)):
        # The command line is not imported by anybody, so it may have its own library at the top.
        if name.split(".")[0] in HEAVY and (source.part, name) != ("cli", "typer"):
            yield source.at(node, f"imports {name} at import time")


HOOKING = re.compile(r"register_\w*hook|add_(perma_)?hook|run_with_(hooks|cache)|set_use_\w+")


def hooks(source: Source) -> Iterator[str]:
    """core/hooks.py alone attaches hooks."""
    if source.path == "core/hooks.py":
        return
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and HOOKING.fullmatch(node.attr):
            yield source.at(node, f"attaches hooks with {node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "hooks":
            yield source.at(node, "attaches hooks with hooks()")


# Not every name with a dot: `blocks.0.` and `hook_z` are the bridge's, `model.layers.0` is a weight's.
HOOK_NAME = re.compile(r"\bblocks\.(\{|\d|$)|\bhook_[a-z]|\bln(1|2|_final)\.|\battn\.[qkvo]\b")


def hook_names(source: Source) -> Iterator[str]:
    """core/sites.py alone spells hook names."""
    if source.path == "core/sites.py":
        return
    for node, text in strings(source):
        if HOOK_NAME.search(text):
            yield source.at(node, f"spells a hook name: {text!r}")
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and re.fullmatch(r"hook_(?!dict$)\w+", node.attr):
            yield source.at(node, f"spells a hook name: .{node.attr}")


def short(source: Source) -> Iterator[str]:
    """One idea a file."""
    n = len(source.text.splitlines())
    if n > MAX_LINES:
        yield f"{source.path}: {n} lines, more than {MAX_LINES}: does it hold one idea?"


def quiet(source: Source) -> Iterator[str]:
    """The command line prints, nobody else."""
    if source.part in ("cli", "__main__"):
        return
    for node in source.nodes:
        if isinstance(node, ast.Call) and (
            dotted(node.func) in ("print", "pprint", "sys.stdout.write", "sys.stderr.write", "breakpoint", "input")
        ):
            yield source.at(node, f"calls {dotted(node.func)}")


def devices(source: Source) -> Iterator[str]:
    """Devices follow the model."""
    for node, text in strings(source):
        if re.fullmatch(r"(cuda|mps|xpu)(:\d+)?", text):
            yield source.at(node, f"names a device: {text!r}")
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "mps", "xpu"):
            yield source.at(node, f"names a device: .{node.attr}")


UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"compile", "eval", "exec", "__import__", "torch.load", "torch.save", "yaml.load"}
# Lenses are published as state dicts; read so, a file gives tensors and runs nothing.
TENSORS_ONLY = "weights_only=True"
SAFE_VALUES = {"allow_pickle": "False", "trust_remote_code": "False", "weights_only": "True"}
UNSAFE_METHODS = {"read_pickle", "to_pickle"}


def safe(source: Source) -> Iterator[str]:
    """A file that is read cannot run code: JSON and safetensors only."""
    for node, name in imports(source):
        if name.split(".")[0] in UNSAFE_MODULES:
            yield source.at(node, f"imports {name}")
        if isinstance(node, ast.ImportFrom) and name == "torch":
            yield from (source.at(node, f"torch.{a.name}") for a in node.names if a.name in ("load", "save"))
    for node in source.nodes:
        if isinstance(node, ast.Call) and dotted(node.func) == "torch.load" and TENSORS_ONLY in map(ast.unparse, node.keywords):
            continue
        if isinstance(node, ast.Call) and (dotted(node.func) in UNSAFE_CALLS or called(node) in UNSAFE_METHODS):
            yield source.at(node, f"calls {dotted(node.func) or called(node)}")
        if isinstance(node, ast.keyword) and node.arg in SAFE_VALUES:
            value = ast.unparse(node.value)
            if value != SAFE_VALUES[node.arg]:
                yield source.at(node.value, f"passes {node.arg}={value}")


GLOBAL_STATE = re.compile(
    r"torch\.(manual_seed|seed|set_\w+)|random\.(?!Random$|SystemRandom$)\w+|(np|numpy)\.random\.(?!default_rng$|Generator$)\w+"
    r"|logging\.(basicConfig|disable)|warnings\.(filterwarnings|simplefilter)|sys\.(excepthook|setrecursionlimit)"
)


def own_state(source: Source) -> Iterator[str]:
    """Who draws owns the generator; nobody changes settings of the process."""
    # `with torch.set_grad_enabled(...)` puts it back.
    scoped = {id(item.context_expr.func) for node in source.nodes if isinstance(node, ast.With)
              for item in node.items if isinstance(item.context_expr, ast.Call)}  # fmt: skip
    # So does `with warnings.catch_warnings():` with what is said inside it.
    for block in source.nodes:
        if isinstance(block, ast.With) and any("catch_warnings" in ast.unparse(item) for item in block.items):
            scoped |= {id(node) for node in ast.walk(block) if dotted(node).startswith("warnings.")}
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and GLOBAL_STATE.fullmatch(dotted(node)) and id(node) not in scoped:
            yield source.at(node, f"touches global state: {dotted(node)}")


def seeds(source: Source) -> Iterator[str]:
    """A seed is said, by its name: keyword-only, without a default."""
    for node in source.nodes:
        # On the command line it is an option with a default, which the output repeats.
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or source.part == "cli":
            continue
        if any(arg.arg == "seed" for arg in [*node.args.posonlyargs, *node.args.args]):
            yield source.at(node, f"{node.name}: seed is not keyword-only")
        for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            # `mi.toys.induction()` is one fixed model, which its seed may vary.
            # None is no seed: what draws refuses it.
            silent = isinstance(default, ast.Constant) and default.value is None
            if arg.arg == "seed" and default is not None and not silent and source.part != "toys":
                yield source.at(node, f"{node.name}: seed has a default")


def refusals(source: Source) -> Iterator[str]:
    """Refusals are raised, not asserted, and every one is a MechInterpError."""
    builtin = re.compile(r"(Exception|(Value|Type|Runtime|Key|Import|OS|Assertion|NotImplemented)Error)")
    for node in source.nodes:
        if isinstance(node, ast.Assert):
            yield source.at(node, "asserts; raise an error of mechinterp.errors")
        if isinstance(node, ast.Raise) and node.exc is not None:
            name = dotted(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            if builtin.fullmatch(name):
                yield source.at(node, f"raises {name}; raise an error of mechinterp.errors")


# Methods that another library calls by this name.
IMPOSED = {"get_mask_sizes", "get_max_cache_shape", "get_seq_length"}


def names(source: Source) -> Iterator[str]:
    """Functions are verbs, classes nouns; no drawer for everything."""
    if re.search(r"(^|[/_])(utils?|helpers?|misc|common)\.py$", source.path):
        yield f"{source.path}: say what is in it"
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef) and re.match(r"_*(get|do)_", node.name) and node.name not in IMPOSED:
            yield source.at(node, f"function {node.name}: name what it gives")
        if isinstance(node, ast.ClassDef) and re.search(r"(Manager|Helper|Util|Utils)$", node.name):
            yield source.at(node, f"class {node.name}: name what it is")


def documented(source: Source) -> Iterator[str]:
    """Every file says in its first line what it is for."""
    if source.text.strip() and not ast.get_docstring(source.tree):
        yield f"{source.path}: has no docstring"


def protocols(source: Source) -> Iterator[str]:
    """A protocol can be checked when the program runs: the tests check every signature."""
    for node in source.nodes:
        if isinstance(node, ast.ClassDef) and "Protocol" in [dotted(base).split(".")[-1] for base in node.bases]:
            marks = [dotted(mark).split(".")[-1] for mark in node.decorator_list]
            if "runtime_checkable" not in marks:
                yield source.at(node, f"class {node.name} is a Protocol without @runtime_checkable")


def tidy(source: Source) -> Iterator[str]:
    """Nothing unfinished."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield f"{source.path}:{number}: unfinished: {line.strip()}"


RULES: dict[Callable[[Source], Iterator[str]], tuple[str, str]] = {
    # rule: (a file that breaks it, a file that does not)
    layers: ("from mechinterp.tasks import Task", "from mechinterp.errors import TaskError"),
    islands: ("def f():\n    import networkx", "def f():\n    import torch"),
    light: ("import transformers", "def f():\n    import transformers"),
    hooks: ("module.register_forward_pre_hook(f)", "self.model.registry"),
    hook_names: ("name = f'blocks.{i}.hook_z'", "'''``blocks.0.hook_z``'''"),
    short: ("pass\n" * 501, "pass\n" * 500),
    quiet: ("print(1)", "'''print(1)'''"),
    devices: ("x.to('cuda:0')", "x.to(model.device)"),
    safe: ("torch.load(path, weights_only=False)", "model.eval()\ntorch.load(path, weights_only=True)"),
    own_state: (
        "torch.manual_seed(0)",
        "torch.Generator().manual_seed(0)\nwith torch.set_grad_enabled(True): pass",
    ),
    seeds: ("def f(*, seed=0): pass", "def f(*, seed): pass"),
    refusals: ("raise ValueError('no')", "raise EditError('no')"),
    names: ("def get_heads(): pass", "def heads(): pass"),
    documented: ("x = 1", "'''Numbers.'''\nx = 1"),
    protocols: ("class A(Protocol): pass", "@runtime_checkable\nclass A(Protocol): pass"),
    tidy: ("# TO" + "DO later", "# to do it later would be slower"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package(rule: Callable[[Source], Iterator[str]]) -> None:
    offences = [offence for source in sources() for offence in rule(source)]
    assert not offences, f"{rule.__doc__}\n" + "\n".join(offences)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_bites(rule: Callable[[Source], Iterator[str]]) -> None:
    bad, good = RULES[rule]
    assert list(rule(Source("core/example.py", bad)))
    assert not list(rule(Source("core/example.py", good)))


@pytest.mark.parametrize(
    ("path", "line", "allowed"),
    [
        ("discovery/a.py", "from mechinterp.patching.path import patch_paths", True),
        ("patching/a.py", "from mechinterp.lens import logit_lens", False),
        ("patching/a.py", "import mechinterp", False),
        ("core/a.py", "from mechinterp import Task", False),
        ("core/a.py", "from . import hooks", True),
        ("core/a.py", "from ..graph import Circuit", False),
        ("core/a.py", "import importlib\nimportlib.import_module('mechinterp.graph')", False),
        ("core/a.py", "if TYPE_CHECKING:\n    from mechinterp.tasks import Task", False),
        ("cli.py", "from mechinterp.discovery import discover", True),
    ],
)
def test_layers_see_every_way_to_import(path: str, line: str, allowed: bool) -> None:
    assert (not list(layers(Source(path, line)))) is allowed


def test_long_files_elsewhere() -> None:
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


@pytest.mark.parametrize(("part", "unknown"), [("graph", "torch"), ("core", "networkx"), ("tasks", "networkx")])
def test_islands_when_run(part: str, unknown: str) -> None:
    # What the source does not say: an import that another import makes.
    code = f"""
import sys, mechinterp.{part}
print("{unknown}" in sys.modules, *(name for name in sys.modules if name.startswith("mechinterp.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded, *own = done.stdout.split()
    assert loaded == "False", f"mechinterp.{part} loads {unknown} through one of {own}"
