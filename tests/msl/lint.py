"""What Metal refuses and clang's C++-for-OpenCL front end does not, found on clang's JSON AST."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from .build import DEFAULT_VERSION, cache_dir, clang, digest, identity, precompiled
from .build import write_atomically as write
from .source import KERNEL_FILE, WRAPPER_FILE, translate

Node = dict[str, Any]


@dataclass(frozen=True, order=True)
class Finding:
    """``line`` is that of the kernel's source; 0 where none applies."""

    line: int
    severity: Literal["error", "warning"]
    message: str

    def __str__(self) -> str:
        return f"{self.line}: {self.severity}: {self.message}"


_BANNED = {
    "GotoStmt": "goto",
    "IndirectGotoStmt": "goto",
    "CXXTryStmt": "exceptions",
    "CXXThrowExpr": "exceptions",
    "CXXNewExpr": "operator new",
    "CXXDeleteExpr": "operator delete",
    "CXXDynamicCastExpr": "dynamic_cast",
    "CXXTypeidExpr": "typeid",
    "GCCAsmStmt": "inline assembly",
}
_WARNINGS = (
    *("-Wpre-c++17-compat", "-Wuninitialized", "-Wsometimes-uninitialized"),
    *("-Wconditional-uninitialized", "-Warray-bounds", "-Wshift-count-overflow", "-Wreturn-type"),
    *("-Wunsequenced", "-Wfor-loop-analysis", "-Wimplicit-fallthrough", "-Wtautological-compare"),
)
# Of those, and of the analyzer's: what is a bug whenever it is right.
_CERTAIN = re.compile(
    r"\[(-Wuninitialized|-Warray-bounds|-Wshift-count-overflow|-Wreturn-type|-Wunsequenced|"
    r"core\.uninitialized\.\w+|core\.CallAndMessage|core\.UndefinedBinaryOperatorResult)\]$"
)
# clang's static analyzer follows paths, so it also knows arrays and what a callee leaves unset.
# Loops are followed for 32 rounds; the bound on nodes keeps a kernel below half a second.
_ANALYZER = (
    *("--analyze", "-Xclang", "-analyzer-output=text", "-Xclang", "-analyzer-checker=core"),
    *("-Xclang", "-analyzer-max-loop", "-Xclang", "33"),
    *("-Xclang", "-analyzer-config", "-Xclang", "max-nodes=30000"),
)
_CPP17 = "[-Wpre-c++17-compat]"
_DIAGNOSTIC = re.compile(r"^(\S+?):(\d+):\d+: (?:fatal )?(error|warning|note): (.*)$", re.M)
_KERNEL = re.compile(r"\[\[\s*kernel\s*\]\]\s*void\s+(\w+)")
_GENERIC_POINTER = re.compile(r"__generic\b[^&*]*\*")
_GENERIC_REFERENCE = re.compile(r"__generic\b[^&*]*&")
_POINTER_REFERENCE = re.compile(r"\*\s*__generic\s*&")
_FUNCTION_POINTER = re.compile(r"\(\s*(\*|&)\s*\w*\)\s*\(")
_BFLOAT = re.compile(r"__bf16|bfloat")
_MEMORY = re.compile(r"__(global|local|constant)\b")
_CASTS = ("CStyleCastExpr", "CXXStaticCastExpr", "CXXFunctionalCastExpr", "ImplicitCastExpr")
_FUNCTIONS = ("FunctionDecl", "CXXMethodDecl")
_SCOPES = ("TranslationUnitDecl", "NamespaceDecl", "LinkageSpecDecl")


def _type(node: Node) -> str:
    return str(node.get("type", {}).get("qualType", ""))


def _first(node: Node) -> Node:
    return next(iter(node.get("inner", [])), {})


@dataclass(frozen=True)
class _Context:
    """Where in the tree a node is: its function's id, and whether at program scope."""

    function: str | None = None
    program_scope: bool = True


class _Walker:
    """One walk over an AST; ``findings`` has what it found."""

    def __init__(self, kernels: set[str], version: int) -> None:
        self.kernels, self.version = kernels, version
        self.findings: list[Finding] = []
        self.file, self.line, self.line_of_file = "", 0, 0
        self.names: dict[str, str] = {}
        self.calls: dict[str, dict[str, int]] = {}  # function, what it calls, in which line
        self.alias: dict[str, str] = {}  # redeclarations of a function

    def walk(self, node: Node, context: _Context) -> None:
        if "kind" not in node:
            return
        file, line = self._position(node)
        if not node.get("isImplicit") and node["kind"] in _FUNCTIONS:
            context = self._enter_function(node, context)
        if file == KERNEL_FILE:
            for rule in (self._statement, self._declaration, self._function, self._expression):
                for message in rule(node, context):
                    severity, _, text = message.rpartition("|")
                    self.findings.append(Finding(line, "warning" if severity else "error", text))
        self._note_calls(node, context, line)
        inner_scope = context.program_scope and node["kind"] in _SCOPES
        for child in node.get("inner", []):
            self.walk(child, _Context(context.function, inner_scope))

    # -- bookkeeping

    def _note_location(self, location: Node) -> None:
        for key in ("spellingLoc", "expansionLoc"):
            if key in location:
                self._note_location(location[key])
        if "offset" not in location:
            return
        # clang's JSON leaves out what did not change; "presumed" is what ``#line`` says.
        self.line_of_file = location.get("line", self.line_of_file)
        self.file = str(location.get("presumedFile") or location.get("file") or self.file)
        renamed = self.file in (KERNEL_FILE, WRAPPER_FILE)
        self.line = location.get("presumedLine", self.line if renamed else self.line_of_file)

    def _position(self, node: Node) -> tuple[str, int]:
        location, span = node.get("loc", {}), node.get("range", {})
        self._note_location(location)
        at = (self.file, self.line)
        known = any(key in location for key in ("line", "col", "expansionLoc"))
        self._note_location(span.get("begin", {}))
        if not known:
            at = (self.file, self.line)
        self._note_location(span.get("end", {}))
        return at

    def _enter_function(self, node: Node, context: _Context) -> _Context:
        previous = node.get("previousDecl")
        first = self.alias.get(previous, previous) if previous else node["id"]
        function = self.alias[node["id"]] = str(first)
        self.names[function] = node.get("name", "")
        self.calls.setdefault(function, {})
        return _Context(function, context.program_scope)

    def _note_calls(self, node: Node, context: _Context, line: int) -> None:
        if context.function is None:
            return
        referenced = node.get("referencedDecl", {})
        if node["kind"] == "DeclRefExpr" and referenced.get("kind") in _FUNCTIONS:
            self.calls[context.function].setdefault(referenced["id"], line)
        if node["kind"] == "MemberExpr" and node.get("referencedMemberDecl"):
            self.calls[context.function].setdefault(node["referencedMemberDecl"], line)

    # -- rules: each yields messages; "warning|..." for the lesser ones

    def _statement(self, node: Node, context: _Context) -> Iterator[str]:
        kind = node["kind"]
        if kind in _BANNED:
            yield f"{_BANNED[kind]} is not allowed in Metal"
        if kind == "LambdaExpr" and self.version < 320:
            yield "lambda expressions need Metal 3.2 (macOS 15)"
        if kind == "BinaryOperator" and node.get("opcode") in ("<<", ">>"):
            yield from self._shift(node)

    @staticmethod
    def _shift(node: Node) -> Iterator[str]:
        count, type_ = node["inner"][1], _type(node)
        while "value" not in count and count.get("inner") and count["kind"] != "BinaryOperator":
            count = count["inner"][0]
        width = 64 if type_ in ("long", "ulong", "unsigned long", "int64_t", "uint64_t") else 32
        literal = count.get("kind") == "IntegerLiteral" and "dependent" not in type_
        if literal and int(count["value"]) >= width:
            yield f"shift count {count['value']} is not less than the width of {type_}"

    def _declaration(self, node: Node, context: _Context) -> Iterator[str]:
        kind, type_, name = node["kind"], _type(node), node.get("name", "")
        if node.get("bases") and not node.get("definitionData", {}).get("isEmpty"):
            yield f"derived class '{name}': only types without data members may have bases"
        declared = (*_FUNCTIONS, "VarDecl", "ParmVarDecl", "FieldDecl")
        if kind in declared and kind != "CXXMethodDecl" and re.search(r"\bdouble\b", type_):
            yield "'double' is not supported in Metal"
        if kind == "VarDecl" and "__tgt_" in type_ and not self._in_kernel(context):
            yield f"threadgroup variable '{name}' declared outside a kernel function"
        variable = kind in ("VarDecl", "ParmVarDecl", "FieldDecl") and not node.get("isImplicit")
        if not variable or not name or name.startswith("__tgt_"):
            return
        if _GENERIC_POINTER.search(type_):
            yield f"pointer '{name}' must have an explicit address space qualifier ({type_})"
        elif _GENERIC_REFERENCE.search(type_) and not _POINTER_REFERENCE.search(type_):
            yield (
                f"warning|reference '{name}' without address space qualifier means thread memory "
                f"before Metal 4.1 ({type_})"
            )
        if node.get("tls"):
            yield "thread_local is not allowed in Metal"
        if _FUNCTION_POINTER.search(type_) or ("(*" in type_ and ")(" in type_):
            yield f"function pointer '{name}' is not allowed in Metal"
        if kind != "VarDecl" or "__constant" in type_:
            return
        if node.get("storageClass") == "static" and context.function:
            yield f"static local variable '{name}' is not allowed in Metal"
        if context.program_scope and "(lambda" not in type_:
            yield f"program scope variable '{name}' must reside in constant address space"

    def _in_kernel(self, context: _Context) -> bool:
        return context.function is not None and self.names[context.function] in self.kernels

    def _function(self, node: Node, context: _Context) -> Iterator[str]:
        if node["kind"] not in _FUNCTIONS or node.get("isImplicit"):
            return
        returned = _type(node).split("(")[0]
        if _GENERIC_POINTER.search(returned):
            yield (
                f"return type of '{node.get('name')}' must have an explicit address space "
                f"qualifier ({returned})"
            )
        if node.get("virtual"):
            yield "virtual functions are not allowed in Metal"
        if node.get("variadic"):
            yield "variadic functions are not allowed in Metal"

    def _expression(self, node: Node, context: _Context) -> Iterator[str]:
        kind, type_ = node["kind"], _type(node)
        casts = ("CStyleCastExpr", "CXXReinterpretCastExpr", "CXXStaticCastExpr")
        if kind in casts and "__generic" in type_:
            yield f"cast to a type without address space qualifier ({type_})"
        if kind == "ImplicitCastExpr" and _BFLOAT.search(type_):
            numeric = node.get("castKind") in ("FloatingCast", "IntegralToFloating")
            source = _type(_first(node))
            explicit = node.get("isPartOfExplicitCast")
            if numeric and not explicit and not _BFLOAT.search(source):
                yield f"implicit conversion from '{source}' to bfloat (use static_cast)"
        if kind == "CompoundAssignOperator" and _BFLOAT.search(type_):
            computed = node.get("computeResultType", {}).get("qualType", "")
            if "float" in computed and "bfloat" not in computed:
                yield "compound assignment to bfloat computes in float and converts back implicitly"
        if kind in _CASTS and node.get("castKind") == "BitCast":
            full = node.get("type", {}).get("desugaredQualType", "") + type_
            # A pointer to vectors may be cast: it is how memory is read 16 bytes at a time.
            if "vector_type" in full and "*" not in type_:
                yield f"vector cast to {type_}: write the conversion as a constructor call"
        if kind == "CXXMemberCallExpr":
            yield from self._member_call(node)

    @staticmethod
    def _member_call(node: Node) -> Iterator[str]:
        member = _first(node)
        base = _first(member)
        while base.get("kind") == "ImplicitCastExpr" and base.get("inner"):
            if base.get("castKind") == "AddressSpaceConversion":
                break
            base = base["inner"][0]
        memory = _MEMORY.search(_type(_first(base)))
        if base.get("castKind") == "AddressSpaceConversion" and memory:
            yield (
                f"member function '{member.get('name')}' has no address space qualifier but is "
                f"called on an object in {memory[1]} memory (before Metal 4.1)"
            )

    # -- over the whole tree

    def find_recursion(self) -> None:
        graph = {
            f: {self.alias.get(g, g): line for g, line in gs.items()}
            for f, gs in self.calls.items()
        }
        finished: set[str] = set()
        for root in graph:
            path: list[str] = []
            stack: list[tuple[str, Iterator[str]]] = [(root, iter(graph[root]))]
            if root in finished:
                continue
            path.append(root)
            while stack:
                function, callees = stack[-1]
                callee = next((g for g in callees if g in graph and g not in finished), None)
                if callee is None:
                    stack.pop()
                    finished.add(path.pop())
                elif callee in path:
                    text = f"recursive call ({self.names[function]} -> {self.names[callee]})"
                    self.findings.append(Finding(graph[function][callee], "error", text))
                else:
                    path.append(callee)
                    stack.append((callee, iter(graph[callee])))


def _diagnostics(text: str, version: int) -> Iterator[Finding]:
    found = _DIAGNOSTIC.findall(text)
    line = "0"
    for i, (file, own_line, severity, message) in enumerate(found):
        if severity == "note" or "double precision constant requires" in message:
            continue
        # What is wrong in a template of the shim was asked for by a line of the kernel; clang names
        # it in a note, once for all that this line asks for.
        if file == KERNEL_FILE:
            line = own_line
        elif file == WRAPPER_FILE:
            continue
        else:
            notes = itertools.takewhile(lambda d: d[2] == "note", found[i + 1 :])
            line = next((n[1] for n in notes if n[0] == KERNEL_FILE), line)
        if _CPP17 in message:
            # Metal accepts `if constexpr` in every version, and MLX uses it throughout.
            if version >= 400 or "constexpr if" in message:
                continue
            severity, message = "error", f"C++17 feature (Metal before 4.0 is C++14): {message}"
        yield Finding(int(line), "error" if _CERTAIN.search(message) else severity, message)


def _check(source: str, name: str, version: int, paths: bool) -> list[Finding]:
    translation = translate(source, name)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        text = Path(folder) / KERNEL_FILE
        text.write_text(translation.text, encoding="utf-8")
        included = ("-include-pch", str(precompiled("fast", version)))
        runs = [("-fsyntax-only", "-Xclang", "-ast-dump=json", *_WARNINGS)]
        if paths:
            runs.append((*_ANALYZER, "-o", str(Path(folder) / "analysis")))
        done, *analysed = (
            subprocess.run(
                [*clang("fast", included), *what, str(text)],
                capture_output=True,
                text=True,
                check=False,
            )
            for what in runs
        )
    findings = list(_diagnostics(done.stderr, version))
    if done.returncode == 0:
        for run in analysed:
            findings += _diagnostics(run.stderr, version)
        walker = _Walker(set(_KERNEL.findall(source)), version)
        walker.walk(json.loads(done.stdout), _Context())
        walker.find_recursion()
        findings += walker.findings
    elif not any(f.severity == "error" for f in findings):  # e.g. in the entry point
        findings.append(Finding(0, "error", done.stderr.strip()))
    return sorted(set(findings))


@functools.lru_cache(maxsize=4096)
def check(
    source: str, name: str, version: int = DEFAULT_VERSION, paths: bool = True
) -> tuple[Finding, ...]:
    """What Metal would refuse or warn of in a kernel, by line; clang's own errors among them.

    ``paths`` also follows the paths through the kernel with clang's static analyzer, which finds
    what is read before it is written and takes four fifths of the time. Results are kept in the
    cache beside the compiled kernels.
    """
    rules = Path(__file__).read_text(encoding="utf-8")
    key = digest(identity("fast", version), translate(source, name).text, rules, str(paths))
    path = cache_dir() / f"lint-{key}.json"
    if not path.exists():
        write(path, json.dumps([astuple(f) for f in _check(source, name, version, paths)]))
    return tuple(Finding(*f) for f in json.loads(path.read_text(encoding="utf-8")))


# macOS 14, 15 and 26.
LANGUAGES = (310, 320, 400)


def check_languages(
    source: str, name: str, versions: Sequence[int] = LANGUAGES
) -> dict[int, tuple[Finding, ...]]:
    """The errors of a kernel in each of MSL 3.1, 3.2 and 4.0; empty tuples if it compiles.

    Paths are followed in the first, since they are the same in all.
    """
    return {
        version: tuple(
            f
            for f in check(source, name, version, paths=version == LANGUAGES[0])
            if f.severity == "error"
        )
        for version in versions
    }
