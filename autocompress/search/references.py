"""The points that every front is held against."""

from __future__ import annotations

from collections.abc import Sequence

from autocompress.build import Artifact
from autocompress.errors import ExportError, MeasurementError, WorkloadError
from autocompress.evaluate import Measured
from autocompress.evaluation import Evaluation
from autocompress.plan import Plan, candidate_name
from autocompress.search.columns import ORIGINAL, STOCK_INT8
from autocompress.search.context import SearchContext

_DYNAMIC = (
    f"{STOCK_INT8} takes the ranges of activations anew at each run, as ONNX Runtime's "
    "documentation advises for this kind of network"
)


def measure_references(context: SearchContext) -> list[Evaluation]:
    """The original network in every runtime, and the stock tool's int8 in the first.

    On the search split, with the limits of the search; what earlier calls measured is read.

    Returns:
        The original in the first runtime, then the others that could be measured.

    Raises:
        ExportError: the original cannot be exported.
        MeasurementError: it does not run in the first runtime.
        WorkloadError: the metric fails on its outputs in the first runtime.
    """
    first, *others = context.runtimes
    wanted = [(ORIGINAL, first), (STOCK_INT8, first), *((ORIGINAL, name) for name in others)]
    context.progress.stage("reference points", len(wanted))
    built: dict[str, Artifact] = {}
    found: dict[str, Evaluation] = {}
    uncoded: list[Measured] = []
    for file, runtime in wanted:
        name = candidate_name(file, runtime, first)
        known = context.folder.evaluation(name, "search")
        if known is not None:
            found[name] = known
        else:
            try:
                if file not in built:
                    built[file] = _build(context, file)
                measured = context.measure_uncoded(built[file], Plan(), runtime).result()
                found[name] = measured.evaluation
                uncoded.append(measured)
            except (ExportError, MeasurementError, WorkloadError) as reason:
                _tell(context, name, reason)
                continue
        context.progress.advance()
    _add_code(context, uncoded, found)
    if any(e.details.get("ranges") == "dynamic" for e in found.values()):
        context.progress.note(_DYNAMIC)
    return list(found.values())


def _add_code(
    context: SearchContext, uncoded: Sequence[Measured], found: dict[str, Evaluation]
) -> None:
    """Wait for the containers, which were begun beside the measurements; keep what is whole."""
    coded = any(measured.coding for measured in uncoded)
    if coded:
        context.progress.stage("code reference points", len(uncoded))
    for measured in uncoded:
        name = measured.evaluation.candidate
        try:
            found[name] = context.evaluator.with_code(measured)
        except ExportError as reason:
            del found[name]
            _tell(context, name, reason)
            continue
        context.folder.save_evaluation(found[name])
        if coded:
            context.progress.advance()


def _tell(context: SearchContext, name: str, reason: Exception) -> None:
    """What another tool or runtime fails at must not end the search; the original's failure does.

    Raises:
        ExportError: `reason`, for the original; or `MeasurementError` or `WorkloadError`.
    """
    if name == ORIGINAL:
        raise reason
    context.progress.note(f"no reference point {name}: {reason}")


def _build(context: SearchContext, file: str) -> Artifact:
    if file == ORIGINAL:
        return context.evaluator.build_original()
    return context.evaluator.build_stock(file)
