"""The structure of the code: who may import whom, how long a file may be, what stays private.

Where a rule is not yet met, the exception stands in a list beside the rule. A list may only
shrink: a test fails as well when one of its entries is no longer needed.
"""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import lit_diffusion

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_diffusion"


def module_name(path):
    """The dotted name under which a file of the package is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py")) if p.stem != "conftest"}
MATHS = [m for m in FILES if "training" not in m.split(".") and not m.endswith("__main__")]
TRAINING = [m for m in FILES if m.startswith("lit_diffusion.training")]

# What the mathematics and nn/ must not import.
FORBIDDEN = [
    "lightning",
    "pytorch_lightning",
    "datasets",
    "torchvision",
    "torchmetrics",
    "torch_fidelity",
    "wandb",
    "jsonargparse",
    "matplotlib",
    "lit_diffusion.training",
]

# Rooms of training/, from the lowest to the highest. A room imports from itself and from those
# before it. Files that stand directly in training/ are the model.
ROOMS = [
    "lightning_internals",
    "run",
    "data",
    "restore",
    "step",
    "the model",
    "evaluation",
    "reporting",
    "callbacks",
    "commands",
    "cli",
]

# Rooms within a room, likewise from the lowest to the highest; files beside them are above them.
ROOMS_WITHIN = {
    "data": ["reading", "decoding", "batching", ""],
    "commands": ["shell", "fit_setup", "proposal", ""],
}

# Circles that an import inside a function closes on purpose: (importer, imported): why.
DEFERRED: dict[tuple[str, str], str] = {}

MAX_LINES_OF_A_FILE = 400
MAX_LINES_OF_A_FUNCTION = 60

# Names with an underscore that are nevertheless public.
DOCUMENTED = {"_asdict", "_fields", "_make", "_replace", "_exit"}
# PyTorch's fused operations, which its own optimizers and scaler are made of and which have no
# public name, and the only trace that `module.compile()` leaves.
DOCUMENTED |= {
    "_foreach_copy_",
    "_foreach_lerp_",
    "_amp_foreach_non_finite_check_and_unscale_",
    "_compiled_call_impl",
}

# Exceptions, each list to become empty.
UPWARD: set[tuple[str, str]] = set()
CIRCLES: set[tuple[str, ...]] = set()
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
PRIVATE: set[tuple[str, str]] = set()


@cache
def tree(module):
    """The syntax tree of a module."""
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def typing_only(node):
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node, skip=lambda node: False):
    """Every node below one, depth first, without the branches to skip."""
    for child in ast.iter_child_nodes(node):
        if skip(child):
            continue
        yield child
        yield from statements(child, skip)


@cache
def imports(module):
    """The modules of the package that a module imports, wherever the statement stands.

    Imports for the type checker do not run and are left out; but a face (`__init__.py`) that
    fetches its names when asked lists them so, and there they count.
    """
    face = FILES[module].name == "__init__.py"
    found = set()
    for node in statements(tree(module), lambda n: typing_only(n) and not face):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in below]
        else:
            continue
        found |= {name for name in names if name in FILES}
    return found - {module}


def room(module):
    """The room of training/ in which a module stands; None for the face."""
    parts = module.split(".")[2:]
    if not parts:
        return None
    if parts[0] in {"cli", "lightning_internals"}:
        return parts[0]
    inside = FILES[module].parent != PACKAGE / "training"
    return parts[0] if inside else "the model"


def circles(graph):
    """The groups of nodes of which each reaches every other (Tarjan's algorithm)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(tuple(sorted(group)))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return set(found)


class Function(NamedTuple):
    """A function of the package and its length without its docstring."""

    name: str
    lines: int


def functions():
    """Every function and method, nested ones too."""
    for module in FILES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node, clean=False) is not None:
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                yield Function(f"{module}.{node.name}", lines)


def only_shrinks(found, exceptions):
    """Nothing is found beyond the exceptions, and each of these is still needed."""
    assert not found - exceptions, f"not allowed: {sorted(found - exceptions)}"
    assert not exceptions - found, f"no longer needed: {sorted(exceptions - found)}"


def imported_by(statement):
    """What a clean interpreter has imported after a statement."""
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout.splitlines()[-1]))


# --- who may import whom ---


def test_the_mathematics_imports_torch_only():
    rooms = "; ".join(f"import {module}" for module in MATHS)
    modules = imported_by(f"{rooms}\nfrom lit_diffusion import *")
    assert not [name for name in FORBIDDEN if name in modules]


def test_networks_know_nothing_of_the_house():
    modules = imported_by("import lit_diffusion.nn")
    assert not [name for name in FORBIDDEN if name in modules]
    ours = {m for m in modules if m.startswith("lit_diffusion.")}
    assert all(m.startswith("lit_diffusion.nn") for m in ours), ours


def test_asking_for_the_version_does_not_wait_for_torch():
    assert "torch" not in imported_by("import lit_diffusion; lit_diffusion.__version__")


def test_nothing_imports_the_command_line():
    users = {module for module in FILES if "lit_diffusion.training.cli" in imports(module)}
    assert users <= {"lit_diffusion.__main__"}


def test_every_room_has_its_place_in_the_order():
    assert {room(module) for module in TRAINING} - {None} == set(ROOMS)


def test_rooms_import_downward_only():
    height = {name: number for number, name in enumerate([*ROOMS, None])}  # None: the face
    upward = {
        (module, other)
        for module in TRAINING
        for other in imports(module) & set(TRAINING)
        if height[room(other)] > height[room(module)]
    }
    only_shrinks(upward, UPWARD)


def room_within(module):
    """The room of a room in which a module stands; "" for none."""
    parts = module.split(".")[3:]
    folder = FILES[module].parent
    return folder.name if parts and folder.parent.parent == PACKAGE / "training" else ""


@pytest.mark.parametrize("outer", ROOMS_WITHIN)
def test_rooms_within_a_room_import_downward_only(outer):
    inside = [module for module in TRAINING if room(module) == outer]
    height = {name: number for number, name in enumerate(ROOMS_WITHIN[outer])}
    assert {room_within(module) for module in inside} == set(height)
    upward = {
        (module, other)
        for module in inside
        for other in imports(module) & set(inside)
        if height[room_within(other)] > height[room_within(module)]
    }
    assert not upward


def test_no_import_closes_a_circle():
    graph = {module: imports(module) for module in FILES}
    for importer, imported in DEFERRED:
        assert imported in graph[importer], f"no longer needed: {importer} -> {imported}"
        graph[importer] = graph[importer] - {imported}
    only_shrinks(circles(graph), CIRCLES)


def test_circles_are_found():
    chain = {"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a", "c"}}
    assert circles(chain) == set()
    assert circles(chain | {"c": {"a"}}) == {("a", "b", "c")}


@pytest.mark.parametrize("bad", ["import lightning", "import datasets", "import wandb"])
def test_ruff_teaches_the_rule(bad, tmp_path):
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml")]
    file = tmp_path / "lit_diffusion" / "room.py"
    file.parent.mkdir()
    file.write_text(f'"""A room."""\n\n{bad}\n')
    out = subprocess.run([*ruff, str(file)], capture_output=True, text=True)
    assert out.returncode == 1
    assert "only lit_diffusion/training" in out.stdout or "belong" in out.stdout


# --- how long a thing may be (how branched: ruff's C901) ---


def test_no_file_is_too_long_to_be_a_lesson():
    lengths = {str(p.relative_to(ROOT)): p.read_text().count("\n") for p in FILES.values()}
    long = {path for path, lines in lengths.items() if lines > MAX_LINES_OF_A_FILE}
    only_shrinks(long, LONG_FILES)


def test_no_function_is_too_long_to_be_read_at_once():
    long = {f.name for f in functions() if f.lines > MAX_LINES_OF_A_FUNCTION}
    only_shrinks(long, LONG_FUNCTIONS)


# --- nobody reaches into the private parts of a library ---


def is_private(name):
    """Whether a name begins with a single underscore."""
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


@cache
def ours():
    """The private names that the package itself defines."""
    names = set()
    for module in FILES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}:
                    names.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_buffer":
                names.add(ast.literal_eval(node.args[0]))
    return names


def private_reaches(module):
    """The private names of other libraries that a module imports or asks an object for."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
            if not own and node.attr not in ours():
                yield node.attr
            continue
        else:
            continue
        yield from (
            name
            for name in names
            if not name.startswith("lit_diffusion") and any(map(is_private, name.split(".")))
        )


def private_overrides(module):
    """The private methods of Lightning that a class of this module replaces."""
    for cls in vars(importlib.import_module(module)).values():
        if not inspect.isclass(cls) or cls.__module__ != module:
            continue
        theirs = [c for c in cls.__mro__[1:] if c.__module__.startswith("lightning.")]
        yield from (
            f"{cls.__name__}.{name}"
            for name in vars(cls)
            if is_private(name) and not name.startswith("_abc_")
            if any(name in vars(base) for base in theirs)
        )


def test_private_parts_of_lightning_are_used_in_one_place_only():
    found = {
        (module, name)
        for module in FILES
        if module != "lit_diffusion.training.lightning_internals"
        for name in private_reaches(module)
    }
    found |= {
        (module, name)
        for module in TRAINING
        if module != "lit_diffusion.training.lightning_internals"
        for name in private_overrides(module)
    }
    only_shrinks(found, PRIVATE)


# --- the face ---


def test_public_names_are_reached_and_unknown_ones_refused():
    for name in dir(lit_diffusion):
        assert getattr(lit_diffusion, name) is not None
    assert {"CosineSchedule", "DiffusionLoss", "WEIGHTINGS", "DDIMSampler"} <= set(
        dir(lit_diffusion)
    )
    with pytest.raises(AttributeError, match="CosinSchedule"):
        _ = lit_diffusion.CosinSchedule
