"""Finds loops over the taps of a convolution that were flattened into one, in source and in compiled code.

Triton 3.6 and its neighbours miscompile them at eight warps and more: wrong numbers, no error (pytorch issue 173068).
"""

from __future__ import annotations

import ast
import re


def flattened_loops(source: str) -> list[str]:
    """Every loop around a matrix product that a compiler would see as one over taps and channels together.

    Args:
        source: of a module with kernels.

    Returns:
        ``function:line: reason``; a loop counter that is divided or reduced modulo something, a loop that Triton is
        told to flatten, and ``while``, whose counters nobody can follow.
    """
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            found += [f"{function.name}:{line}: {reason}" for line, reason in _flattened(function)]
    return found


def _flattened(function: ast.FunctionDef) -> list[tuple[int, str]]:
    found = []
    for loop in ast.walk(function):
        if not isinstance(loop, ast.For | ast.While) or not _multiplies(loop):
            continue
        if isinstance(loop, ast.While):
            found.append((loop.lineno, "while around a product"))
            continue
        if "flatten=True" in ast.unparse(loop.iter):
            found.append((loop.lineno, "flatten=True"))
        counters = _derived(loop)
        for node in ast.walk(loop):
            division = isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod)
            if division and counters & _names(node.left):
                found.append((node.lineno, f"{ast.unparse(node)} takes a counter apart"))
    return found


def _multiplies(node: ast.AST) -> bool:
    return any(isinstance(call, ast.Call) and ast.unparse(call.func) == "tl.dot" for call in ast.walk(node))


def _names(node: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _derived(loop: ast.For) -> set[str]:
    """The loop's counter and what is computed from it."""
    names, before = _names(loop.target), set()
    assignments = [node for node in ast.walk(loop) if isinstance(node, ast.Assign)]
    while names != before:
        before = set(names)
        for assignment in assignments:
            if names & _names(assignment.value):
                names |= {name for target in assignment.targets for name in _names(target)}
    return names


def loops_around_products(ir: str) -> list[int]:
    """How many loops enclose each matrix product.

    Args:
        ir: TTIR or TTGIR of a compiled kernel; the latter shows what is left after pipelining.

    Returns:
        One number a product, in the order of the code.
    """
    depths, open_blocks = [], []  # indentation of a block's first line, and whether it is a loop
    for line in ir.splitlines():
        text = line.strip()
        if not text or text.startswith(("}", "#", "^")):
            continue
        indentation = len(line) - len(line.lstrip())
        while open_blocks and open_blocks[-1][0] >= indentation:
            open_blocks.pop()
        if re.search(r"= (?:tt\.dot|ttng\.warp_group_dot) ", text):
            depths.append(sum(is_loop for _, is_loop in open_blocks))
        if text.count("{") > text.count("}"):
            open_blocks.append((indentation, "scf.for" in text or "scf.while" in text))
    return depths
