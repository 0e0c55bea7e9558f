"""Building and measuring a solved plan as the search would have done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autocompress.build import BASELINE
from autocompress.config import Experiment, read_yaml, validate
from autocompress.errors import RunFolderError
from autocompress.evaluate import Evaluator, Extras
from autocompress.evaluation import Evaluation
from autocompress.files import write_json
from autocompress.search.kept_models import read_source
from autocompress.search.paying_levels import keep_paying_levels
from autocompress.search.prepare import Options, Prepared, builder_of, fill_bank, prepare
from autocompress.search.progress import Progress, Silent
from autocompress.search.solve import Solved, solved_path
from autocompress.search.solve_figures import figures_of


def measure_solved(
    solved: Solved, experiment: Path | None = None, progress: Progress | None = None
) -> Solved:
    """Build a solved plan, measure it as candidates are measured, and put its figures beside.

    The file goes to the run's `artifacts/`, the plan to `plans/`, the figures to `solved/`; the
    study and the front stay as they are. What was measured before is not measured again.

    Args:
        solved: see `solve.solve`.
        experiment: the run's experiment file; None takes the one that the search was called with.

    Raises:
        RunFolderError: the experiment file is not known, or it, its workload or this device are
            not the run's.
        MeasurementError, ExportError: the plan's file cannot be made, or fails.
    """
    if solved.measured is not None:
        return solved
    prepared = _prepared(solved.run, experiment or read_source(solved.run), progress or Silent())
    with prepared.folder.claim(prepared.identity):
        prepared = keep_paying_levels(prepared, progress or Silent())
        evaluation = _measured(prepared, solved, progress or Silent())
        path = solved_path(solved.run, solved.candidate)
        path.parent.mkdir(exist_ok=True)
        prepared.folder.save_plan(solved.plan)
        write_json(path, evaluation.to_dict())
    return replace(solved, measured=figures_of(evaluation, solved.original_metric))


def _prepared(run: Path, path: Path, progress: Progress) -> Prepared:
    """The run's own experiment; only its workload, network and device are read from elsewhere."""
    resolved = run / "experiment.yaml"
    data = read_yaml(resolved, RunFolderError).get("experiment")
    if not isinstance(data, dict):
        raise RunFolderError("The run does not say which experiment it is of.", given=resolved)
    kept = validate(Experiment, data, f"experiment of {resolved}", RunFolderError)
    # A search needs a limit to be prepared; none is done here.
    prepared = prepare(path, Options(run, trials=1, seed=kept.search.seed), progress)
    identity = replace(prepared.identity, experiment=kept)
    return replace(prepared, experiment=kept, identity=identity)


def _measured(prepared: Prepared, solved: Solved, progress: Progress) -> Evaluation:
    bank = fill_bank(prepared, progress)
    builder = builder_of(prepared, bank)
    objectives = prepared.experiment.objectives
    memory = bool({"peak_memory", "gpu_memory"} & set(objectives))
    coded = solved.predicted.download_bytes is not None
    extras = Extras(coded, "energy" in objectives, memory)
    progress.stage("build and measure the solved plan")
    with Evaluator(
        prepared.workload, builder, prepared.device, prepared.folder.path, extras
    ) as evaluator:
        # The empty plan's file is the original's, and every speed-up is against that.
        if not solved.plan.steps:
            artifact = evaluator.build_original()
        else:
            if not builder.path(BASELINE).is_file():
                evaluator.build_original()
            artifact = evaluator.artifact(solved.plan)
        return evaluator.measure(artifact, solved.plan, solved.runtime, "search", final=False)
