"""Imports go downwards only, light commands load nothing heavy, and nothing outgrows a reader."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlxfuse

PACKAGE = Path(mlxfuse.__file__).parent

# The layers, lowest first; a module imports from lower layers or from its own room.
LAYERS = (
    ("errors", "env", "files", "streams", "terminal"),
    ("formats",),
    ("blas", "codebooks", "memory", "process"),
    ("ranks",),
    ("gguf", "kernels"),
    ("tokenizer", "hub", "nn"),
    ("models", "fusion"),
    ("inspect",),
    ("sharing",),
    ("loader", "export"),
    ("generate",),
    ("server",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Third-party packages that only some modules may import at all.
ONLY = {
    "typer": {"cli"},
    "prompt_toolkit": {"cli"},
    "rich": {"cli"},
    "requests": {"hub"},
    "huggingface_hub": {"hub"},
}
NO_MLX = {
    *(
        "errors",
        "env",
        "files",
        "streams",
        "formats",
        "codebooks",
        "terminal",
        "blas",
        "memory",
        "process",
        "ranks",
    ),
    *("gguf", "tokenizer", "hub", "inspect"),
}
# Imported by a loaded model only.
TOKENIZER = {"tokenizer.load", "tokenizer.backend", "tokenizer.merging"}
HEAVY = ("mlx", "mlx_lm", "transformers", "tokenizers", "torch")


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        yield name.removesuffix(".__init__"), path


def imports(source, module, is_package):
    """(absolute name, imported at module level) of every import, relative ones resolved."""
    tree = ast.parse(source)
    top = set(ast.walk(ast.Module([n for n in tree.body if not _is_definition(n)], [])))
    package = ["mlxfuse", *module.split(".")] if module != "__init__" else ["mlxfuse", ""]
    package = package if is_package and module != "__init__" else package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{stem}.{alias.name}", node in top


def _is_definition(node):
    is_check = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    return is_check or isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)


def violations(name, source, is_package=False):
    area = name.split(".")[0]
    if area == "__init__":
        return []
    found = []
    for target, at_top in imports(source, name, is_package):
        parts = target.split(".")
        if parts[0] in ONLY and area not in ONLY[parts[0]]:
            found.append(f"{name} imports {target}")
        if parts[0] in HEAVY and at_top and area in NO_MLX and name not in TOKENIZER:
            found.append(f"{name} imports {target} at module level")
        if parts[0] != "mlxfuse" or len(parts) < 2 or parts[1] == area:
            continue
        if parts[1] in RANK and RANK[parts[1]] >= RANK[area]:
            found.append(f"{name} imports {target}, which is not below it")
        if parts[1] not in RANK and parts[1] != "__version__":
            found.append(f"{name} imports {target}, which has no layer")
    return found


def test_every_module_has_a_layer():
    areas = {name.split(".")[0] for name, _ in modules()} - {"__init__"}
    assert areas <= set(RANK)


def test_imports_go_downwards():
    found = []
    for name, path in modules():
        source = path.read_text(encoding="utf-8")
        found += violations(name, source, path.name == "__init__.py")
    assert found == []


def circles(sources):
    """Groups of modules that import each other, within functions too; types alone do not count.

    sources: (module, its text, whether it is a package).
    """
    names = {f"mlxfuse.{name}" for name, _, _ in sources}
    graph = {}
    for name, source, is_package in sources:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                node.body = [ast.Pass()]
        targets = {
            target if target in names else target.rpartition(".")[0]
            for target, _ in imports(ast.unparse(tree), name, is_package)
        }
        graph[f"mlxfuse.{name}"] = targets & names - {f"mlxfuse.{name}"}

    def reached(start):
        seen, left = set(), [start]
        while left:
            new = graph[left.pop()] - seen
            seen |= new
            left += new
        return seen

    below = {name: reached(name) for name in graph}
    return {frozenset(n for n in graph if name in below[n] and n in below[name])
            for name in graph if name in below[name]}  # fmt: skip


def test_modules_do_not_import_each_other():
    sources = [(n, p.read_text(encoding="utf-8"), p.name == "__init__.py") for n, p in modules()]
    assert circles(sources) == set()


@pytest.mark.parametrize("late", ["from .b import y", "def f():\n    from .b import y"])
def test_a_circle_is_noticed(late):
    other = ("nn.b", "from .a import x", False)
    found = circles([("nn.a", late, False), other, ("nn.c", "", False)])
    assert found == {frozenset({"mlxfuse.nn.a", "mlxfuse.nn.b"})}
    types = f"if TYPE_CHECKING:\n    {late}" if "def" not in late else ""
    assert circles([("nn.a", types, False), other]) == set()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("gguf.reader", "from ..kernels import x"),
        ("gguf.reader", "import mlx.core as mx"),
        ("kernels.matmul", "from mlxfuse.gguf import blocks"),
        ("errors", "from .hub import resolve"),
        ("loader", "def f():\n    from .cli import main"),
        ("hub", "import typer"),
        ("inspect", "from mlx import core"),
        ("nn.cpu", "from ..load import load"),
        ("loader", "from .nowhere import x"),
    ],
)
def test_a_wrong_import_is_noticed(name, source):
    assert violations(name, source)


def loaded(*args):
    """The heavy packages in a process that ran ``mlxfuse`` with ``args``."""
    code = (
        "import atexit, json, sys\n"
        f"names = {HEAVY!r}\n"
        "atexit.register(lambda: print('HEAVY', json.dumps("
        "[n for n in names if n in sys.modules]), file=sys.stderr))\n"
        "import mlxfuse\n"
        f"sys.argv = ['mlxfuse', *{list(args)!r}]\n"
        "if len(sys.argv) > 1:\n"
        "    from mlxfuse.cli import main\n"
        "    main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        cwd=PACKAGE.parent,
    )  # fmt: skip
    heavy = json.loads(process.stderr.rpartition("HEAVY")[2])
    return process.returncode, process.stdout, heavy


def test_light_commands_load_nothing_heavy(tmp_path):
    from .models import tiny

    path = tiny.write(tmp_path / "m.gguf", tiny.build("llama", 0))
    assert loaded() == (0, "", [])
    for args in (["--help"], ["--version"], ["generate", "--help"], ["inspect", str(path)]):
        code, out, heavy = loaded(*args)
        assert (code, heavy) == (0, []), args
        assert out
    # Control: what generates does load them.
    assert "mlx" in loaded("generate", str(path), "-m", "1", "--ignore-chat-template")[2]


FORMS = ("nn", "fusion", "kernels")
LONG = 60  # lines of a function, with its signature and docstring
ALLOWED = {"long function": 6, "long file": 0, "text or a thing": 0, "int8 flag": 0,
           "state of a thread": 1}  # fmt: skip


def rare(sources):
    """What is to stay rare: (rule, where it is found) of each; sources: (module, its text)."""
    for name, source in sources:
        if len(source.splitlines()) > 400:
            yield "long file", name
        if re.search(r"threading\.local\b|\bContextVar\(", source):
            yield "state of a thread", name
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where = f"{name}.{node.name}"
            if node.end_lineno - node.lineno >= LONG:
                yield "long function", where
            kinds = set() if node.returns is None else set(ast.unparse(node.returns).split(" | "))
            # A reason in place of a value; NotFusible and its like are raised.
            if name.split(".")[0] in FORMS and "str" in kinds and kinds - {"str", "None"}:
                yield "text or a thing", where
            for argument in (*node.args.args, *node.args.kwonlyargs):
                if argument.arg == "int8" and "bool" in ast.unparse(argument.annotation or node):
                    yield "int8 flag", where


def test_what_a_reader_stumbles_over_stays_rare():
    found = {rule: [] for rule in ALLOWED}
    for rule, where in rare((n, p.read_text(encoding="utf-8")) for n, p in modules()):
        found[rule].append(where)
    assert {rule: where for rule, where in found.items() if len(where) > ALLOWED[rule]} == {}


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("long function", "def f():\n" + "    x = 1\n" * LONG),
        ("long file", "x = 1\n" * 401),
        ("text or a thing", "def f() -> Form | str:\n    return 'no norm'"),
        ("int8 flag", "def f(x, *, int8: bool = False): ..."),
        ("state of a thread", "given = threading.local()"),
        ("state of a thread", "chosen: ContextVar[int] = ContextVar('chosen')"),
    ],
)
def test_what_a_reader_stumbles_over_is_noticed(rule, source):
    assert list(rare([("nn.a", source)])) == [(rule, "nn.a" + ".f" * source.startswith("def"))]
    shorter = "def f() -> str | None:\n" + "    x = 1\n" * (LONG - 1)
    assert list(rare([("nn.a", shorter)])) == []


def names_of_models(sources, known):
    """(module, name) of each text outside of `models` that is the name of an architecture or a
    class of mlx-lm; those of tokenizers are their own.
    """
    for name, source in sources:
        if name.split(".")[0] not in ("models", "tokenizer"):
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Constant) and node.value in known:
                    yield name, node.value


def test_architectures_are_named_in_models_only():
    from mlxfuse.models import ARCHITECTURES

    known = {*ARCHITECTURES, *(a.module.rpartition(".")[2] for a in ARCHITECTURES.values())}
    assert {"llama", "gemma4", "gemma4_text", "qwen3_moe"} <= known
    sources = [(name, path.read_text(encoding="utf-8")) for name, path in modules()]
    assert list(names_of_models(sources, known)) == []
    assert list(names_of_models([("export.a", "if kind == 'llama': ...")], known))  # control
