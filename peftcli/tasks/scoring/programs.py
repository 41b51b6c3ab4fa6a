"""The program in what a model has written: out of Markdown, without the text around it, cut where it is complete."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings

FENCE = re.compile(r"^[ \t]*```([^\n`]*)$", re.MULTILINE)
BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
DEFINES = re.compile(r"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)", re.MULTILINE)
CODE = re.compile(r"^(?:async|def|class|import|from|@)\b", re.MULTILINE)
CUT = (ast.Expr, ast.Assert, ast.Return)
"""Statements that say nothing to a program when they stand at its end: uses, tests, and what was not indented."""


def program(text: str, start: str = "") -> str:
    """The program that is run.

    Args:
        text: What the model has written.
        start: What it had to continue, such as a function's head (HumanEval); empty where it writes all (MBPP).

    Returns:
        Python source; where no program can be made out, the text as it is, which fails then.
    """
    text = _unfenced(text.replace("\r\n", "\n"))
    return _continued(text, start) if start.strip() else _whole(text) or text


def _unfenced(text: str) -> str:
    """The first fenced block that defines something, after those of imports; else the first one.

    The last one may lack its end.
    """
    first = FENCE.search(text)
    if first is None:
        return text
    before, after = text[: first.start()], text[first.end() :]
    odd = len(FENCE.findall(text)) % 2 == 1 and not DEFINES.search(after)
    if before.strip() and not first[1].strip() and (DEFINES.search(before) or odd):
        return before  # the prompt had opened the fence that ends here
    blocks = BLOCK.findall(text)
    at = next((i for i, block in enumerate(blocks) if DEFINES.search(block)), None)
    if at is None:
        chosen = blocks[0] if blocks else before
        return chosen if chosen[:1].isspace() else textwrap.dedent(chosen)
    plain = [textwrap.dedent(block) for block in blocks[: at + 1]]
    return "\n".join([*(block for block in plain[:-1] if _only_imports(block)), plain[-1]])


def _only_imports(block: str) -> bool:
    return _is_python(block) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in _parse(block).body)


def _whole(text: str) -> str:
    """The lines from the first that is code on, as many as can be read, without uses at their end; empty if none."""
    for begin in (0, *(found.start() for found in CODE.finditer(text))):
        lines = text[begin:].splitlines()
        nodes = _readable(lines)
        if kept := [node for node in nodes if not _is_cut(node)]:
            first = next(node for node in nodes if not isinstance(node, ast.Expr) and not _is_remark(node))
            decorated = getattr(first, "decorator_list", None)
            return "\n".join(lines[(decorated or [first])[0].lineno - 1 : kept[-1].end_lineno])
    return ""


def _is_cut(node: ast.stmt) -> bool:
    """Whether a statement is no part of the program where nothing but its like follows."""
    is_main = isinstance(node, ast.If) and any(
        isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test)
    )
    return is_main or isinstance(node, CUT) or _is_remark(node)


def _is_remark(node: ast.stmt) -> bool:
    """Whether it is `Note: done`, which Python reads as a name with its type."""
    return isinstance(node, ast.AnnAssign) and node.value is None


def _readable(lines: list[str]) -> list[ast.stmt]:
    """The statements of the longest beginning that is Python, as far as the parser tells where it stops to be."""
    while lines:
        try:
            return _parse("\n".join(lines)).body
        except SyntaxError as error:
            lines = lines[: min(error.lineno or 1, len(lines)) - 1]
        except (ValueError, RecursionError, MemoryError):
            break
    return []


def _continued(text: str, start: str) -> str:
    """The start with what follows it, up to the next statement at the margin; or with a definition of its own."""
    names = DEFINES.findall(start)
    again = rf"^(?:async\s+)?def\s+{names[-1]}\b" if names else r"\Z\A"
    # The start's imports and helpers are still needed; what it begins is defined anew.
    own = [f"{start.rstrip()}\n\n\n{_whole(text)}"] if re.search(again, text, re.MULTILINE) else []
    body = text.lstrip("\n")
    if body[:1].strip() and start.endswith("\n"):  # the indentation of its first line was lost
        body = _indentation(start) + body
    lines = body.splitlines()
    cuts = [at for at, line in enumerate(lines) if at and line[:1].strip()]
    # A line at the margin may also stand within a bracket or a text; then what is before it cannot be read.
    onwards = [start + "\n".join(lines[:cut]) for cut in [*cuts, len(lines)]]
    candidates = [*own, *onwards] if CODE.match(text.lstrip("\n")) else [*onwards, *own]
    return next((found for found in candidates if _is_python(found)), start + body)


def _indentation(start: str) -> str:
    """Of the line that follows the start."""
    last = start.rstrip().splitlines()[-1]
    return last[: len(last) - len(last.lstrip())] + "    " * last.endswith(":")


def _is_python(source: str) -> bool:
    try:
        _parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in a text
        return ast.parse(source)
