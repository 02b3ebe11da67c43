"""The rules of the house that a machine can check: who may import whom, what importing costs, how files look."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).resolve().parents[1]

CORE = "vision_remember"
ADAPTERS = "vision_remember.adapters"
FOLDERS = {CORE: ROOT / "vision_remember", ADAPTERS: ROOT / "adapters"}
OUTSIDE = {name: ROOT / name for name in ("examples", "benchmarks", "tests")}

# the core's libraries, and those that one room may know besides them
CORE_LIBRARIES = {"torch"}
ROOM_LIBRARIES = {
    "vision_remember.ops": {"triton"},
    "vision_remember.synth": {"numpy", "PIL", "matplotlib", "skimage", "sklearn"},
}
ADAPTER_LIBRARIES = {*CORE_LIBRARIES, "transformers", "safetensors", "huggingface_hub", "numpy", "typer"}

# the two doors from the core to the adapters, opened when somebody knocks and not before
LAZY_DOORS = {"vision_remember": "names of attach.py", "vision_remember.tap": "the table of encoders"}

# what a room may import of the core besides itself; rooms that are not listed are bound by the other rules only
GROUND = {"config", "grid", "layout", "registry", "typed"}
ARROWS = {
    "config": GROUND,
    "grid": GROUND,
    "layout": GROUND,
    "registry": GROUND,
    "typed": set(),
    "encoder": GROUND,
    "memory": GROUND | {"ops", "side_stream"},
    "side_stream": set(),
    "analysis": GROUND | {"memory"},
    "ops": GROUND,
    "interactions": GROUND | {"ops"},
    "projectors": GROUND | {"ops"},
    "pruning": GROUND,
    "saliency": GROUND | {"ops"},
    "synth": GROUND,
    "remember": GROUND | {"ops", "interactions"},
}

LONGEST_FILE = 400
BLOCKED = ("transformers", "timm", "open_clip", "safetensors", "huggingface_hub", "peft", "PIL", "matplotlib")

Kind = Literal["module", "guarded", "inner", "typing", "dynamic"]


@dataclass(frozen=True)
class Import:
    """One import statement or look-up.

    Attributes:
        target: dotted name; a name taken from a package is part of it, ``a.b.c`` for ``from a.b import c``.
        kind: at module level, in a ``try`` that expects it to fail, in a function, for type checkers, or by importlib.
    """

    target: str
    kind: Kind
    line: int

    @property
    def library(self) -> str:
        return self.target.split(".")[0]


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def is_core(self) -> bool:
        return not self.is_adapter and within(self.name, CORE)

    @property
    def is_adapter(self) -> bool:
        return within(self.name, ADAPTERS)

    @property
    def room(self) -> str:
        """The part of the core that the module belongs to: its package or, at the top, its own name."""
        return room_of(self.name)

    def imports(self) -> list[Import]:
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        return list(read_imports(self.tree, package))

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def catches_import_error(node: ast.Try) -> bool:
    names = {
        leaf.id
        for handler in node.handlers
        if handler.type
        for leaf in ast.walk(handler.type)
        if isinstance(leaf, ast.Name)
    }
    return bool(names & {"ImportError", "ModuleNotFoundError"})


def read_imports(node: ast.AST, package: str, kind: Kind = "module") -> Iterator[Import]:
    """Every import below ``node``, with the innermost reason why it is not simply at module level."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, kind, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - child.level + 1]) if child.level else ""
            module = ".".join(part for part in (base, child.module) if part)
            for alias in child.names:
                yield Import(f"{module}.{alias.name}", kind, child.lineno)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from read_imports(ast.Module(child.body, []), package, "typing")
            yield from read_imports(ast.Module(child.orelse, []), package, kind)
        elif isinstance(child, ast.Try) and catches_import_error(child):
            yield from read_imports(child, package, "guarded" if kind == "module" else kind)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from read_imports(child, package, "inner" if kind in ("module", "guarded") else kind)
        else:
            if isinstance(child, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(child.func)):
                first = child.args[0] if child.args else None
                literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
                yield Import(first.value if literal else "(computed)", "dynamic", child.lineno)
            yield from read_imports(child, package, kind)


def read_modules(folders: dict[str, Path]) -> list[Module]:
    modules = []
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):  # rglob does not follow the link vision_remember/adapters
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            modules.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"))))
    return modules


LIBRARY = read_modules(FOLDERS)
CORE_MODULES = [module for module in LIBRARY if module.is_core]
ADAPTER_MODULES = [module for module in LIBRARY if module.is_adapter]
EVERYTHING = LIBRARY + read_modules(OUTSIDE)
OURS = (CORE, *OUTSIDE, "adapters")


def owner(target: str, names: set[str]) -> str | None:
    """The module among ``names`` that an import of ``target`` reaches: itself, or the one it takes a name from."""
    while target and target not in names:
        target = target.rpartition(".")[0]
    return target or None


def is_foreign(entry: Import) -> bool:
    """Whether the import needs something that is neither ours nor Python's own."""
    return entry.library not in sys.stdlib_module_names and entry.library not in OURS and entry.target != "(computed)"


def test_the_reader_sees_every_kind_of_import() -> None:
    source = """
import a
from . import sibling
from ..up import name
if TYPE_CHECKING:
    import b
try:
    import c
except ImportError:
    c = None
def f():
    import d
    importlib.import_module("e.f")
    import_module(name)
class K:
    import g
"""
    found = {(entry.target, entry.kind) for entry in read_imports(ast.parse(source), "pkg.sub")}
    assert found == {
        ("a", "module"),
        ("pkg.sub.sibling", "module"),
        ("pkg.up.name", "module"),
        ("b", "typing"),
        ("c", "guarded"),
        ("d", "inner"),
        ("e.f", "dynamic"),
        ("(computed)", "dynamic"),
        ("g", "module"),
    }
    assert CORE_MODULES
    assert ADAPTER_MODULES


def test_core_knows_torch_alone() -> None:
    wrong = []
    for module in CORE_MODULES:
        room = {library for name, extra in ROOM_LIBRARIES.items() if within(module.name, name) for library in extra}
        for entry in module.imports():
            if is_foreign(entry) and entry.library not in CORE_LIBRARIES | room:
                wrong.append(f"{module.at(entry.line)} imports {entry.target}")
    assert not wrong, "\n".join(wrong)


def test_core_reaches_adapters_through_its_lazy_doors_only() -> None:
    wrong = []
    for module in CORE_MODULES:
        for entry in module.imports():
            adapters = within(entry.target, ADAPTERS) or entry.library == "adapters"
            if module.name in LAZY_DOORS:
                bad = adapters and entry.kind in ("module", "guarded")
            else:
                bad = adapters or entry.kind == "dynamic"
            if bad:
                wrong.append(f"{module.at(entry.line)} imports {entry.target} ({entry.kind})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_inside_the_core(room: str) -> None:
    wrong = []
    for module in CORE_MODULES:
        for entry in module.imports():
            if (
                module.room == room
                and within(entry.target, CORE)
                and room_of(entry.target) not in ARROWS[room] | {room}
            ):
                wrong.append(f"{module.at(entry.line)} imports {entry.target}")
    assert not wrong, "\n".join([f"{room} may import {sorted(ARROWS[room])}:", *wrong])


def test_adapters_say_where_they_come_from() -> None:
    """Optional libraries are imported where they are used, or with an ImportError in mind."""
    wrong = []
    for module in ADAPTER_MODULES:
        for entry in module.imports():
            if entry.kind == "module" and is_foreign(entry) and entry.library not in ADAPTER_LIBRARIES:
                wrong.append(f"{module.at(entry.line)} imports {entry.target} at module level")
            if entry.library == "adapters":
                wrong.append(f"{module.at(entry.line)} imports {entry.target}: write {CORE}.{entry.target}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_what_stands_above() -> None:
    above = {"vision_remember": OUTSIDE.keys(), "examples": {"tests", "benchmarks"}, "benchmarks": {"tests"}}
    wrong = []
    for module in EVERYTHING:
        for entry in module.imports():
            if entry.library in above.get(module.name.split(".")[0], ()):
                wrong.append(f"{module.at(entry.line)} imports {entry.target}")
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    names = {module.name for module in LIBRARY}
    graph: dict[str, set[str]] = {}
    for module in LIBRARY:
        entries = [entry for entry in module.imports() if entry.kind not in ("typing", "dynamic")]
        if module.name in LAZY_DOORS:
            entries = [entry for entry in entries if not within(entry.target, ADAPTERS)]
        reached = {owner(entry.target, names) for entry in entries}
        graph[module.name] = {name for name in reached if name} - {module.name}

    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "circle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for reached in sorted(graph[name]):
                visit(reached, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_files_stay_readable() -> None:
    lengths = {module.at(1): len(module.path.read_text(encoding="utf-8").splitlines()) for module in EVERYTHING}
    assert not {place: length for place, length in lengths.items() if length > LONGEST_FILE}


def test_nothing_is_left_unfinished() -> None:
    unfinished = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    wrong = [
        f"{module.at(number)} {line.strip()}"
        for module in EVERYTHING
        for number, line in enumerate(module.path.read_text(encoding="utf-8").splitlines(), start=1)
        if unfinished.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_library_prints_only_where_it_promises_to() -> None:
    """``set_phase`` says what trains; such a line carries ruff's mark, everything else logs."""
    calls = [
        module.at(node.lineno)
        for module in LIBRARY
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if "# noqa: T201" not in module.path.read_text(encoding="utf-8").splitlines()[node.lineno - 1]
    ]
    assert not calls, f"log instead of printing: {calls}"


def test_every_module_says_what_it_is() -> None:
    silent = [module.at(1) for module in EVERYTHING if module.tree.body and not ast.get_docstring(module.tree)]
    assert not silent


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_core_loads_nothing_else() -> None:
    loaded = run_python("import sys, vision_remember; print(*sys.modules, sep='\\n')").split()
    assert "torch" in loaded
    assert not [name for name in loaded if name in BLOCKED or within(name, ADAPTERS)]


def test_importing_the_core_changes_nothing() -> None:
    """No log handlers, warning filters, torch switches or environment variables; and nothing printed."""
    state = (
        "(len(logging.getLogger().handlers), len(warnings.filters), dict(os.environ), torch.get_default_dtype(), "
        "torch.get_num_threads(), torch.is_grad_enabled(), torch.backends.cuda.matmul.allow_tf32, torch.initial_seed())"
    )
    code = f"import logging, os, warnings, torch; torch.manual_seed(0); before = {state}\n"
    assert run_python(f"{code}import vision_remember\nassert before == {state}") == ""


def test_core_works_without_the_optional_libraries() -> None:
    """Every core module imports with torch alone; a GPU kernel may miss its compiler."""
    modules = [module.name for module in CORE_MODULES if not module.name.endswith("__main__")]
    code = f"""
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Block())
import vision_remember
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
for name in vision_remember.__all__:
    try:
        getattr(vision_remember, name)
    except ImportError as error:
        assert "blocked" in str(error) or "transformers" in str(error), error
"""
    run_python(code)


def test_public_names_exist() -> None:
    import vision_remember

    assert len(vision_remember.__all__) == len(set(vision_remember.__all__))
    assert not [name for name in vision_remember.__all__ if not hasattr(vision_remember, name)]
    assert set(vision_remember.__all__) <= set(dir(vision_remember))
    assert not set(vision_remember.__all__) & set(dir(builtins))
