"""Calling the function in the user's file that returns a workload."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from autocompress.errors import AutocompressError, WorkloadError
from autocompress.workload.inputs import describe
from autocompress.workload.types import Workload

# Names of modules that users' files are imported as begin so.
WORKLOAD_PREFIX = "_workload_"


def load_workload(spec: str, near: Path | None = None) -> Workload:
    """Call the user's function that returns a workload.

    Args:
        spec: `file.py:function`; the file's folder can be imported from, as for a script.
        near: the experiment file; the path is looked up beside it first, then from the working
            directory.

    Raises:
        WorkloadError: no such file or function, or it raises or returns something else.
    """
    name, separator, function_name = spec.rpartition(":")
    if not separator or not name.endswith(".py") or not function_name.isidentifier():
        raise WorkloadError(
            "A workload's name is malformed.", given=spec, allowed="file.py:function"
        )
    candidates = [*([near.parent / name] if near else []), Path(name)]
    path = next((p.resolve() for p in candidates if p.is_file()), None)
    if path is None:
        raise WorkloadError(
            "The workload's file does not exist.",
            given=spec,
            allowed="one of " + ", ".join(dict.fromkeys(str(p.absolute()) for p in candidates)),
            advice="correct `workload` in the experiment file",
        )
    with _importable(path.parent):
        module = _import_file(path)
        function = getattr(module, function_name, None)
        if not callable(function):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise WorkloadError(
                f"The workload's file has no function '{function_name}'.",
                given=spec,
                allowed=", ".join(names) or "the file has no functions at all",
                advice="correct `workload` in the experiment file",
            )
        workload = _guarded(function, f"The workload's function '{function_name}' raised", path)
    if not isinstance(workload, Workload):
        raise WorkloadError(
            f"The workload's function '{function_name}' returned no Workload.",
            given=describe(workload),
            allowed="autocompress.workload.Workload",
        )
    return workload


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _import_file(path: Path) -> ModuleType:
    # A hash of the path keeps two files of the same name apart, and apart from installed modules.
    name = f"{WORKLOAD_PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise WorkloadError("The workload's file cannot be imported.", given=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader = spec.loader
    try:
        _guarded(lambda: loader.exec_module(module), "The workload's file cannot be imported", path)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _guarded(function: Callable[[], object], what: str, path: Path) -> object:
    try:
        return function()
    except AutocompressError:
        raise
    except (Exception, SystemExit) as cause:
        raise WorkloadError(
            f"{what}: {type(cause).__name__}: {cause}",
            given=path,
            advice="run the same command with --debug for the traceback",
        ) from cause
