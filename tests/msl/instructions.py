"""Instructions of a kernel's inner loop, from its PTX: a proxy for the work of one iteration.

PTX is not Apple's instruction set. What makes the figure useful is that another kernel's, from the
same compiler, stands beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .ptx import AS_METAL, compile_ptx

_FUNCTION = re.compile(
    r"^[ \t]*(?:\.visible |\.weak )?\.(?:func|entry)[^;{]*\{(.*?)^\}", re.M | re.S
)
_LABEL = re.compile(r"^(\$\w+):")
_BRANCH = re.compile(r"^(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$\w+);")
_BYTES = re.compile(r"^(?:@!?%p\d+\s+)?ld\.global(?:\.nc)?(?:\.v(\d))?\.[a-z](\d+)\s")
_MEMORY = re.compile(r"^(?:@!?%p\d+\s+)?(?:ld|st)\.")


@dataclass
class _Block:
    """A run of instructions without a jump inside, and the blocks that may follow."""

    lines: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A loop that holds no other.

    Attributes:
        instructions: of one iteration, all branches taken together, loads and stores left out.
        load_bytes: what a lane's loads from device memory in it read.
        loads: how many they are.
    """

    instructions: int
    load_bytes: int
    loads: int


def _blocks(body: str) -> list[_Block]:
    blocks = [_Block()]
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    falls = True
    for raw in body.splitlines():
        line = raw.partition("//")[0].strip()
        label = _LABEL.match(line)
        if label:
            if blocks[-1].lines:
                blocks.append(_Block())
                if falls:
                    blocks[-2].next.append(len(blocks) - 1)
            labels[label[1]] = len(blocks) - 1
            falls = True
            continue
        if not line or line.startswith(".") or not line.endswith(";"):
            continue
        blocks[-1].lines.append(line)
        branch = _BRANCH.match(line)
        ends = line in ("ret;", "exit;", "trap;")
        if branch:
            jumps.append((len(blocks) - 1, branch[2]))
        if branch or ends:
            blocks.append(_Block())
            falls = bool(branch and branch[1])
            if falls:
                blocks[-2].next.append(len(blocks) - 1)
    for block, label_name in jumps:
        blocks[block].next.append(labels[label_name])
    return blocks


def _reachable(blocks: list[_Block]) -> list[int]:
    """Blocks by the order in which a depth-first walk leaves them, last first."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].next))]
    while stack:
        at, following = stack[-1]
        to = next(following, None)
        if to is None:
            order.append(at)
            stack.pop()
        elif to not in seen:
            seen.add(to)
            stack.append((to, iter(blocks[to].next)))
    return order[::-1]


def _natural_loops(blocks: list[_Block]) -> list[set[int]]:
    """The loops of each header: what leads to a jump back to a block that dominates it."""
    order = _reachable(blocks)
    before: dict[int, list[int]] = {i: [] for i in order}
    for i in order:
        for to in blocks[i].next:
            before[to].append(i)
    dominators = {i: set(order) for i in order}
    dominators[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            found = set.intersection(*(dominators[p] for p in before[i])) | {i}
            changed |= found != dominators[i]
            dominators[i] = found
    loops: dict[int, set[int]] = {}
    for i in order:
        for header in set(blocks[i].next) & dominators[i]:
            loop = loops.setdefault(header, {header})
            todo = [i]
            while todo:
                at = todo.pop()
                if at not in loop:
                    loop.add(at)
                    todo += before[at]
    return list(loops.values())


def inner_loops(ptx: str) -> list[Loop]:
    """The innermost loops of all functions of a PTX text, in no particular order."""
    return [loop for body in _FUNCTION.findall(ptx) for loop in _inner_loops(_blocks(body))]


def largest_loop(source: str, name: str) -> Loop:
    """The innermost loop of a kernel that reads the most in one iteration.

    Raises:
        ValueError: no loop of the kernel reads device memory.
        MslSetupError: without CUDA's libdevice.
    """
    loops = inner_loops(compile_ptx(source, name, options=AS_METAL))
    loop = max(loops, key=lambda loop: loop.load_bytes, default=Loop(0, 0, 0))
    if not loop.load_bytes:
        raise ValueError(f"no loop of {name} reads device memory")
    return loop


def _inner_loops(blocks: list[_Block]) -> list[Loop]:
    loops = _natural_loops(blocks)
    found = []
    for loop in loops:
        if any(other < loop for other in loops):
            continue
        lines = [line for i in sorted(loop) for line in blocks[i].lines]
        sizes = [int(m[1] or 1) * int(m[2]) // 8 for line in lines if (m := _BYTES.match(line))]
        count = sum(not _MEMORY.match(line) for line in lines)
        found.append(Loop(count, sum(sizes), len(sizes)))
    return found
