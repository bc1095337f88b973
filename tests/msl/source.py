"""Metal source as MLX generates it, and its translation for clang's C++-for-OpenCL front end.

MLX's JIT preamble (``mlx::core::metal::utils()``) is rebuilt from the headers in the installed
wheel. A kernel's own text is MLX's too (see ``emulate.capture``). Four token-level rewrites, which
keep line numbers, cover what the front end cannot say:

* ``threadgroup T x[N];`` becomes a reference to storage of the threadgroup (clang forbids local
  variables of that address space in templates);
* ``vec<T, N>(a, b)`` becomes a call of the constructor function;
* the qualifier ``thread`` of a constructor is dropped;
* ``template [[host_name(...)]] [[kernel]]`` becomes ``template``.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import MslSetupError

KERNEL_FILE = "kernel.metal"
WRAPPER_FILE = "wrapper"
ENTRY = "__msl_entry"

# The order in which MLX concatenates them (mlx/backend/metal/make_compiled_preamble.sh).
_PREAMBLE = ("bf16.h", "bf16_math.h", "complex.h", "defines.h", "logging.h", "utils.h")
_KERNELS = "mlx/backend/metal/kernels/"


# ---- the preamble -----------------------------------------------------------------------------


@functools.cache
def mlx_include() -> Path:
    """The include directory of the installed mlx wheel (``mlx`` is a namespace package)."""
    spec = importlib.util.find_spec("mlx")
    places = (spec.submodule_search_locations if spec else None) or ()
    for place in places:
        path = Path(place) / "include"
        if (path / _KERNELS).is_dir():
            return path
    raise MslSetupError("the installed mlx has no Metal headers; 0.32.1 or newer is needed")


@functools.cache
def preamble() -> str:
    """The text MLX puts before every custom kernel, byte for byte."""
    bar = "/" * 79
    title = f"// Auto generated source for {_KERNELS}{_PREAMBLE[-1]}"
    out = ["// Copyright © 2025 Apple Inc.", "", title, ""]
    for header in _PREAMBLE:
        out += [bar, f'// Contents from "{_KERNELS}{header}"', bar, ""]
        out += [f'#line 1 "{_KERNELS}{header}"']
        text = (mlx_include() / _KERNELS / header).read_text(encoding="utf-8")
        for line in text.splitlines():
            if not re.search(r'#include ".*.h"', line) and "#pragma once" not in line:
                out.append(line)
        out.append("")
    out.append(bar)
    return "\n" + "\n".join(out) + "\n"


@functools.cache
def prefix(version: int) -> str:
    """What precedes every kernel here: language version, standard library, MLX's preamble."""
    header = f"#define __METAL_VERSION__ {version}\n#include <metal_stdlib>\n"
    return header + rewrite(preamble())


# ---- tokens -----------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|[A-Za-z_]\w*|\d[\w.]*|\s+|::|->|.", re.S
)
_DECLARATOR = re.compile(r"\s*([A-Za-z_]\w*)\s*((?:\[[^\]]*\]\s*)*)$", re.S)
_DECLARATION = re.compile(
    r"\s*(?:alignas\([^)]*\)\s*)?(.*?)\s*\b([A-Za-z_]\w*\s*(?:\[[^\]]*\]\s*)*)$", re.S
)
_FUNCTION_CONSTANT = re.compile(
    r"^(\s*(?:static\s+)?constant\s+(?:constexpr\s+)?\w+\s+\w+)\s*"
    r"\[\[\s*function_constant\(\d+\)\s*\]\]\s*;",
    re.M,
)


def _blank(token: str) -> bool:
    return token.isspace() or token.startswith(("//", "/*"))


def _split_commas(text: str) -> list[str]:
    """Split at the commas outside all brackets."""
    parts, depth, current = [], 0, ""
    for token in _TOKEN.findall(text):
        depth += token in ("(", "[", "{", "<")
        depth -= token in (")", "]", "}", ">")
        if token == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += token
    return [*parts, current]


class _Rewriter:
    """One pass over the tokens of a source text."""

    def __init__(self, source: str) -> None:
        self.tokens: list[str] = _TOKEN.findall(source)
        self.classes = set(re.findall(r"\b(?:struct|class)\s+(\w+)", source))
        self.out: list[str] = []
        self.variables = 0
        self.scopes = ["0"]  # where the last threadgroup variable in each open brace ends

    def run(self) -> str:
        i = 0
        statement_start = True
        while i < len(self.tokens):
            token = self.tokens[i]
            if _blank(token):
                self.out.append(token)
                i += 1
                continue
            end = None
            if statement_start and token == "threadgroup":
                end = self._threadgroup_variable(i)
            elif token == "vec":
                end = self._vector_constructor(i)
            elif token == "thread" and self._qualifies_constructor(i):
                end = i + 1
            if end is not None:
                statement_start = token == "threadgroup"
                i = end
                continue
            statement_start = token in ("{", "}", ";")
            if token == "{":
                self.scopes.append(self.scopes[-1])
            elif token == "}" and len(self.scopes) > 1:
                self.scopes.pop()
            self.out.append(token)
            i += 1
        return "".join(self.out)

    def _threadgroup_variable(self, start: int) -> int | None:
        """Rewrite the declaration at ``start``; the index after it, or None if it is none."""
        end, depth = start + 1, 0
        while end < len(self.tokens) and not (self.tokens[end] == ";" and depth == 0):
            depth += self.tokens[end] in ("(", "[", "{", "<")
            depth -= self.tokens[end] in (")", "]", "}", ">")
            end += 1
        declaration = "".join(t for t in self.tokens[start + 1 : end] if not t.startswith("//"))
        head = re.sub(r"\[.*", "", declaration, flags=re.S)
        bare = re.sub(r"<[^<>]*>|alignas\([^)]*\)", "", head)
        if any(c in head for c in "*&=") or "(" in bare or "operator" in declaration:
            return None
        first, *others = _split_commas(declaration)
        match = _DECLARATION.match(first)
        if match is None:
            return None
        for declarator in (match[2], *others):
            name = _DECLARATOR.match(declarator)
            if name is None:
                return None
            self.out.append(
                f"typedef {match[1]} __tgt_{name[1]} {name[2]}; "
                f"MSL_TG_DECL({self.variables}, {self.scopes[-1]}, {name[1]}) "
            )
            self.scopes[-1] = f"__tge_{self.variables}"
            self.variables += 1
        self.out.append("\n" * "".join(self.tokens[start:end]).count("\n"))
        return end + 1

    def _vector_constructor(self, start: int) -> int | None:
        """``vec<T, N>(`` as ``__mk<vec<T, N>>(``; the index of the parenthesis, or None."""
        if start + 1 >= len(self.tokens) or self.tokens[start + 1] != "<":
            return None
        if next((t for t in reversed(self.out) if not _blank(t)), "") == "operator":
            return None  # a conversion operator
        end, depth = start + 2, 1
        while end < len(self.tokens) and depth:
            depth += self.tokens[end] == "<"
            depth -= self.tokens[end] == ">"
            end += 1
        if end >= len(self.tokens) or self.tokens[end] != "(":
            return None
        self.out.append("__mk<" + "".join(self.tokens[start:end]) + ">")
        return end

    def _qualifies_constructor(self, at: int) -> bool:
        """Is this ``thread`` the one of ``Name(...) thread {``, with ``Name`` a class?"""
        following = next((t for t in self.tokens[at + 1 : at + 8] if not _blank(t)), "")
        before = [t for t in self.out[-200:] if not _blank(t)]
        if following not in ("{", ";", ":", "=") or not before or before[-1] != ")":
            return False
        depth = 0
        for i in range(len(before) - 1, -1, -1):
            depth += before[i] == ")"
            depth -= before[i] == "("
            if depth == 0:
                return i > 0 and before[i - 1] in self.classes
        return False


def rewrite(source: str) -> str:
    """Metal source with the four rewrites applied; line numbers are kept."""
    # Function constants are set when a pipeline is made, which MLX's custom kernels never do.
    return _FUNCTION_CONSTANT.sub(r"\1 = {};", _Rewriter(source).run())


# ---- kernel parameters and the entry point -----------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: ``type`` with qualifiers, ``ref`` in ("", "*", "&"), its attribute.

    ``index`` is the buffer index, None for a thread attribute.
    """

    type: str
    ref: str
    name: str
    attribute: str
    index: int | None


def parameters(source: str, name: str) -> tuple[Parameter, ...]:
    """The parameters of kernel ``name`` in order."""
    match = re.search(rf"\[\[\s*kernel\s*\]\]\s*void\s+{re.escape(name)}\s*\(", source)
    if match is None:
        raise ValueError(f"the source has no kernel '{name}'")
    end, depth = match.end(), 1
    while depth:
        depth += source[end] == "("
        depth -= source[end] == ")"
        end += 1
    found = []
    for text in _split_commas(source[match.end() : end - 1]):
        attribute = re.search(r"\[\[\s*(\w+)(?:\((\d+)\))?\s*\]\]", text)
        assert attribute is not None, text
        declared = re.match(r"(.*?)([*&]?)\s*(\w+)$", text[: attribute.start()].strip(), re.S)
        assert declared is not None, text
        index = int(attribute[2]) if attribute[2] else None
        found.append(Parameter(declared[1].strip(), declared[2], declared[3], attribute[1], index))
    return tuple(found)


# Thread attributes (MSL specification 5.2.3.6) as members of the runtime's Ids.
_VECTOR_IDS = {
    "thread_position_in_grid": "pos_grid",
    "thread_position_in_threadgroup": "pos_tg",
    "threadgroup_position_in_grid": "tg_pos",
    "threads_per_threadgroup": "tg_size",
    "dispatch_threads_per_threadgroup": "nominal",
    "threads_per_grid": "grid",
    "grid_size": "grid",
    "threadgroups_per_grid": "groups",
}
_THREADS = "(d->tg_size[0] * d->tg_size[1] * d->tg_size[2])"
_SCALAR_IDS = {
    "thread_index_in_threadgroup": "d->idx_tg",
    "thread_index_in_simdgroup": "d->lane",
    "simdgroup_index_in_threadgroup": "d->sg",
    "simdgroups_per_threadgroup": "d->nsg",
    "dispatch_simdgroups_per_threadgroup": "d->nsg",
    "threads_per_simdgroup": "32",
    "thread_execution_width": "32",
    "quadgroup_index_in_threadgroup": "d->idx_tg / 4",
    "thread_index_in_quadgroup": "d->idx_tg % 4",
    "quadgroups_per_threadgroup": f"({_THREADS} + 3) / 4",
}
_IDS = (
    "struct __msl_ids { uint pos_grid[3], pos_tg[3], tg_pos[3], tg_size[3], grid[3], groups[3], "
    "nominal[3]; uint idx_tg, lane, sg, nsg; };"
)


def _argument(p: Parameter) -> str:
    if p.attribute == "buffer":
        pointer = f"({p.type} *)b[{p.index}]"
        return pointer if p.ref == "*" else f"*{pointer}"
    width = {"2": 2, "3": 3}.get(p.type[-1], 1)
    if p.attribute in _VECTOR_IDS:
        member = _VECTOR_IDS[p.attribute]
        if width == 1:
            return f"{p.type}(d->{member}[0])"
        return f"__mk<{p.type}>({', '.join(f'd->{member}[{i}]' for i in range(width))})"
    if p.attribute == "grid_origin":
        return f"__mk<{p.type}>(0u)"
    return f"({p.type})({_SCALAR_IDS[p.attribute]})"


def _wrapper(found: tuple[Parameter, ...], call: str) -> str:
    """The function with C linkage through which the runtime calls the kernel."""
    unchecked = 'no_sanitize("kernel-address"), no_sanitize("undefined")'
    return (
        f'\n{_IDS} extern "C" __attribute__((visibility("default"), {unchecked})) '
        f"void {ENTRY}(const thread ulong *b, const thread __msl_ids *d) "
        f"{{ {call}({', '.join(_argument(p) for p in found)}); }}\n"
    )


_INSTANTIATION = re.compile(
    r"template\s*\[\[\s*host_name\(\s*\"[^\"]*\"\s*\)\s*\]\]\s*\[\[\s*kernel\s*\]\]\s*"
    r"(?P<type>decltype\(.*?\)\s*)(?P<name>[^;]*?);",
    re.S,
)


@dataclass(frozen=True)
class Translation:
    """A kernel for the front end.

    Attributes:
        body: the kernel's own text, what follows ``prefix``.
        wrapper: the entry point of the host route.
        parameters: of the kernel, in order.
        call: the kernel with its template arguments.
    """

    body: str
    wrapper: str
    parameters: tuple[Parameter, ...]
    call: str

    @property
    def text(self) -> str:
        """Body and wrapper."""
        return self.body + self.wrapper

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of the buffer arguments, by index."""
        return tuple(p.name for p in self.parameters if p.attribute == "buffer")


_TENSOR_OPS = "#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n"


def _with_tensor_ops(source: str) -> str:
    """The source with our stand-in for Metal's tensor operations, where it includes those.

    As text, so that other kernels are not compiled anew when the stand-in changes.
    """
    before, found, after = source.partition(_TENSOR_OPS)
    if not found:
        return source
    stand_in = Path(__file__).with_name("tensor_ops.h").read_text("utf-8")
    line = before.count("\n") + 2
    return f'{before}#line 1 "tensor_ops.h"\n{stand_in}#line {line} "{KERNEL_FILE}"\n{after}'


@functools.lru_cache(maxsize=1024)
def translate(source: str, name: str) -> Translation:
    """Translate what MLX hands to Metal, without its preamble, for kernel ``name``."""
    source = _with_tensor_ops(source)
    call, body, found = name, source, parameters(source, name)
    instantiation = _INSTANTIATION.search(source)
    if instantiation:
        call = instantiation["name"]
        explicit = f"template {instantiation['type']}{call};"
        body = source[: instantiation.start()] + explicit + source[instantiation.end() :]
    text = f'#line 1 "{KERNEL_FILE}"\n{rewrite(body)}\n#line 1 "{WRAPPER_FILE}"\n'
    return Translation(text, _wrapper(found, call), found, call)
