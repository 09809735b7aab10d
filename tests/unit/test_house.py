"""The rules of the house, checked: who may import whom, what stays light, where method names may appear."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tritune
from tritune.methods import table

SOURCE = Path(tritune.__file__).parent

#: lowest layer first; a module may import from its own layer's package or from lower ones, never upwards
LAYERS: list[tuple[str, ...]] = [
    ("errors", "misfits", "spec", "progress", "packaged", "measure", "process", "waiting"),
    ("tasks.base", "evaluate.record", "models.base"),
    ("text", "tasks"),
    ("models",),
    ("methods",),
    ("run", "store"),
    ("evaluate", "train"),
    ("report",),
    ("adaptation",),
    ("exchange",),
    ("finished", "forecast", "pace", "trial"),
    ("composition",),
    ("search", "seeds"),
    ("comparison",),
    ("recipes",),
    ("cli",),
]
#: neighbours of one layer that must not know each other
STRANGERS = {("evaluate", "train")}


def modules() -> list[Path]:
    return [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def layer(module: str) -> int:
    fits = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert fits, f"{module} has no layer: add it to LAYERS"
    return max(fits)[1]


def imports(path: Path) -> list[str]:
    """Modules of tritune that a file imports, anywhere in it, but not just for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tritune."):
            base = node.module.removeprefix("tritune.")
            is_package = (SOURCE / base.replace(".", "/")).is_dir()
            found += [f"{base}.{alias.name}" if is_package else base for alias in node.names]
    return found


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_point_down(path: Path) -> None:
    own = dotted(path)
    upward = [name for name in imports(path) if layer(name) > layer(own)]
    assert not upward
    pairs = {(own.split(".")[0], name.split(".")[0]) for name in imports(path)}
    assert not pairs & STRANGERS or own.split(".")[0] not in {a for a, _ in STRANGERS}


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    if path.read_text(encoding="utf-8").strip():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


#: other packages' vocabulary has words that are also ours
FOREIGN = SOURCE / "exchange"


@pytest.mark.parametrize(
    "path", [p for p in modules() if p.parent.name != "methods" and FOREIGN not in p.parents], ids=dotted
)
def test_no_method_is_named_outside_methods(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    own_meaning = {"full"}  # also the name of a strategy
    assert not words & (set(table()) - own_meaning - _defaults(tree))


def _defaults(tree: ast.AST) -> set[str]:
    """A method's name as the default of an argument is a choice for the user, not a branch."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    defaults = [
        d for node in nodes for d in (*node.args.defaults, *node.args.kw_defaults) if isinstance(d, ast.Constant)
    ]
    return {d.value for d in defaults if isinstance(d.value, str)}


def test_nothing_dangerous_is_read() -> None:
    for path in modules():
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"torch\.load\([^()]*weights_only=True\)", "", text)  # torch's reader for plain tensors
        for word in ("pickle.load", "torch.load", "yaml.unsafe", "trust_remote_code=True", "eval("):
            assert word not in text.replace(".eval(", ""), f"{dotted(path)} has {word}"


@pytest.mark.parametrize(
    "module", ["tritune", "tritune.cli", "tritune.tasks.classification", "tritune.report.html", "tritune.run"]
)
def test_light_modules_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_what_they_seem() -> None:
    for name in dir(tritune):
        assert getattr(tritune, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tritune.nonsense
    assert {"LoRA", "PTuning", "Full", "Bottleneck"} <= set(dir(tritune))


def test_no_public_name_is_also_a_module() -> None:
    """Importing a module puts it into its package: one of the same name would take a function's place."""
    assert not set(dir(tritune)) & {dotted(path).split(".")[0] for path in modules()}
