"""The code of a module without what is for people and type checkers only: docstrings, and annotations of functions.

Those of classes stay, for corral.oci.decode reads them. What is imported from __future__ is for the compiler, who is
told here; to load that module as well would be of use to nobody.
"""

import __future__

import ast
from pathlib import Path
from types import CodeType

type _Function = ast.FunctionDef | ast.AsyncFunctionDef


class _Bare(ast.NodeTransformer):
    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        node.body = [_plain(each) for each in _without_docstring(node)]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.body = _without_docstring(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self._strip(node)
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AsyncFunctionDef:
        self._strip(node)
        return node

    def _strip(self, node: _Function) -> None:
        self.generic_visit(node)
        node.returns = None
        given = node.args
        for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
            if each is not None:
                each.annotation = None
        node.body = _without_docstring(node)


def _without_docstring(node: ast.Module | ast.ClassDef | _Function) -> list[ast.stmt]:
    if ast.get_docstring(node, clean=False) is None:
        return node.body
    return node.body[1:] or [ast.copy_location(ast.Pass(), node.body[0])]


def _plain(statement: ast.stmt) -> ast.stmt:
    if not isinstance(statement, ast.AnnAssign):
        return statement
    plain = ast.Pass() if statement.value is None else ast.Assign([statement.target], statement.value)
    return ast.copy_location(plain, statement)


def bare_code(source: str) -> CodeType:
    """The code of the module in a file, told to be of it."""
    tree = _Bare().visit(ast.parse(Path(source).read_bytes(), source))
    flags = 0
    for each in [each for each in tree.body if isinstance(each, ast.ImportFrom) and each.module == "__future__"]:
        tree.body.remove(each)
        for name in each.names:
            flags |= getattr(__future__, name.name).compiler_flag
    code: CodeType = compile(ast.fix_missing_locations(tree), source, "exec", flags=flags, dont_inherit=True)
    return code
