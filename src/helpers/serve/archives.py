"""Reading what `torch.export.save` wrote, from wherever it comes: what a file may hold is looked at before PyTorch reads it."""

import ast
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.export.pt2_archive._package

from helpers.files import StudyError, check_whole, refused

EXPORT_IT = (
    "Where you can load it, write torch.export.save(torch.export.export(model.eval(), (example,)), 'model.pt2') "
    "and give that file."
)

# What stands in an archive of torch.export that holds one program and no code. Not there: libraries that AOTInductor compiled,
# which run when they are loaded, and objects that need pickle.
_ENTRIES = re.compile(
    r"[^/]*/(archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|extra/.*"
    r"|models/model\.json|data/(weights|constants)/(\w+_)?(weights_config|constants_config|config)\.json"
    r"|data/(weights|constants)/(weight|tensor)_\w+|data/sample_inputs/model\.pt)"
)
# Operators by the names that PyTorch writes. A free hand would reach torch.ops.load_library, torch.os.system and operator.attrgetter.
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prim|prims|quantized_decomposed|higher_order|torchvision)\.[a-zA-Z]\w*(\.[a-zA-Z]\w*)?"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_)|math\.\w+|torch\.sym_\w+"
)
_FORMULA = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.operator)
_FORMULA += (ast.unaryop, ast.cmpop, ast.keyword, ast.Load)
_FUNCTIONS = {"Symbol", "Integer", "Float", "Rational", "Max", "Min", "Mod", "Abs", "ceiling", "floor", "Eq", "Ne"}
_FUNCTIONS |= {*torch.utils._sympy.functions.__all__}


def load_exported(path: Path) -> "torch.export.ExportedProgram":
    """Read what `torch.export.save` wrote, without unpickling objects, loading libraries or evaluating code.

    `torch.export.load` itself does all three where a file asks for it (torch 2.14). Raises StudyError for a file of another
    kind, a damaged one, and one that asks for it.
    """
    if not zipfile.is_zipfile(path):
        raise StudyError(f"{path} is no .pt2 archive, or a damaged one. {EXPORT_IT}")
    with refused(f"{path} is damaged; make it again"):
        check_whole(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            foreign = [name for name in names if not _ENTRIES.fullmatch(name)]
            models = [name for name in names if name.endswith("/models/model.json")]
            twice = [name for name in names if names.count(name) > 1]  # readers differ in which of them they take
            if len(models) != 1 or foreign or twice:
                what = f"it holds {(foreign + twice)[0]}" if foreign + twice else "it holds no traced model"
                raise StudyError(f"{path} is no program that torch.export.save wrote ({what}). {EXPORT_IT}")
            program = json.loads(archive.read(models[0]))
    vetted = {"target": _is_operator, "as_operator": _is_operator, "expr_str": _is_formula}
    vetted |= {"in_spec": _is_plain_tree, "out_spec": _is_plain_tree}
    for key, value in _texts(program):
        if key in vetted and not vetted[key](value):
            raise StudyError(f"{path} asks for {value!r}, which the study takes from no file.")
    with (
        refused(f"{path} was not read; write it again with this version of PyTorch, {torch.__version__}"),
        _no_pickle(),
    ):
        read = torch.export.load(path)
    read._guards_code = []  # Python code, which `module` would run
    return read


def _is_operator(name: str) -> bool:
    return bool(_OPERATORS.fullmatch(name)) and "__" not in name


def _is_formula(text: str) -> bool:
    """Whether a text is arithmetic on sizes: PyTorch evaluates it as Python."""
    try:
        nodes = [*ast.walk(ast.parse(text, mode="eval"))]
    except (SyntaxError, ValueError, RecursionError):
        return False
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return (
        all(isinstance(node, _FORMULA) for node in nodes)
        and all(value.isidentifier() if isinstance(value, str) else True for value in constants)
        and all(isinstance(function, ast.Name) and function.id in _FUNCTIONS for function in called)
    )


def _is_plain_tree(text: str) -> bool:
    """Whether a text describes tuples, lists and dictionaries: for other containers PyTorch imports modules by name."""

    def plain(node: dict[str, Any]) -> bool:
        keys = json.loads(node["context"]) if node["context"] else None
        return (
            node["type"] in (None, "builtins.tuple", "builtins.list", "builtins.dict")
            and (keys is None or (isinstance(keys, list) and all(isinstance(key, str) for key in keys)))
            and all(map(plain, node["children_spec"]))
        )

    try:
        return not text or plain(json.loads(text)[1])
    except (ValueError, KeyError, TypeError, IndexError):
        return False


def _texts(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    for inner, value in content.items() if isinstance(content, dict) else ():
        yield from _texts(value, inner)
    for value in content if isinstance(content, list) else ():
        yield from _texts(value, key)


@contextmanager
def _no_pickle() -> Iterator[None]:
    """Let PyTorch load tensors only: where it would unpickle anything, it fails."""
    load = torch.load

    def tensors_only(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **options | {"weights_only": True})

    def refuse(*_: Any, **__: Any) -> None:
        raise pickle.UnpicklingError("it holds objects that need pickle")

    with (
        patch.object(torch, "load", tensors_only),
        patch.object(pickle, "loads", refuse),
        patch.object(torch._C, "_pickle_load_obj", refuse),
        patch.object(torch.export.pt2_archive._package, "_load_aoti", refuse),
    ):
        yield
