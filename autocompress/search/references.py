"""The points that every front is held against."""

from __future__ import annotations

from autocompress.build import Artifact
from autocompress.errors import ExportError, MeasurementError
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
    """
    first, *others = context.runtimes
    wanted = [(ORIGINAL, first), (STOCK_INT8, first), *((ORIGINAL, name) for name in others)]
    context.progress.stage("reference points", len(wanted))
    built: dict[str, Artifact] = {}
    found: list[Evaluation] = []
    for file, runtime in wanted:
        name = candidate_name(file, runtime, first)
        known = context.folder.evaluation(name, "search")
        if known is None:
            try:
                if file not in built:
                    built[file] = _build(context, file)
                known = context.measure(
                    built[file], Plan(), runtime, "search", final=False
                ).result()
            except (ExportError, MeasurementError) as reason:
                if name == ORIGINAL:
                    raise
                # What another tool or runtime fails at must not end the search.
                context.progress.note(f"no reference point {name}: {reason}")
                continue
            context.folder.save_evaluation(known)
        if known.details.get("ranges") == "dynamic":
            context.progress.note(_DYNAMIC)
        found.append(known)
        context.progress.advance()
    return found


def _build(context: SearchContext, file: str) -> Artifact:
    if file == ORIGINAL:
        return context.evaluator.build_original()
    return context.evaluator.build_stock(file)
