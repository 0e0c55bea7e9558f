from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

from autocompress.errors import ConfigError
from autocompress.search.samplers import SamplerContext, make_sampler

NAMES = ("tpe", "nsga2", "nsga3", "gp", "random", "mutation")
SPACE = {f"layer{i}|prune": IntDistribution(0, 2 + i) for i in range(4)}
# Fewer for the Gaussian process: a draw takes a second once it is fitted.
COUNTS = dict.fromkeys(NAMES, 60) | {"gp": 9}


@pytest.fixture(autouse=True)
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def figures(values, objectives=2):
    """Objectives in conflict, all to be minimised."""
    levels = np.array(list(values.values()), float)
    goals = np.linspace(0, 3, objectives)
    return [float(((levels - goal) ** 2).sum()) for goal in goals]


def open_study(name, *, seed=0, objectives=2, context=None):
    context = context or SamplerContext()
    return optuna.create_study(
        directions=["minimize"] * objectives, sampler=make_sampler(name, seed, context)
    )


def run(study, count, space=SPACE):
    found = []
    for _ in range(count):
        trial = study.ask(space)
        study.tell(trial, figures(trial.params, len(study.directions)))
        found.append(trial.params)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_every_value_is_in_its_range(name, objectives):
    found = run(open_study(name, objectives=objectives), min(COUNTS[name], 25))
    for values in found:
        assert values.keys() == SPACE.keys()
        for parameter, value in values.items():
            assert type(value) is int
            assert 0 <= value <= SPACE[parameter].high


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_draws_and_another_one_others(name):
    first, again, other = (run(open_study(name, seed=s), COUNTS[name]) for s in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", NAMES)
def test_one_parameter_and_one_of_a_single_value(name):
    space = {"network|quantize": IntDistribution(0, 30), "fixed": IntDistribution(2, 2)}
    found = run(open_study(name), min(COUNTS[name], 30), space)
    assert {values["fixed"] for values in found} == {2}
    assert len({values["network|quantize"] for values in found}) > 3


@pytest.mark.parametrize("name", NAMES)
def test_failed_pruned_and_running_trials_do_no_harm(name):
    study = open_study(name)
    waiting = study.ask(SPACE)
    # Killed before all of its parameters were drawn.
    study.ask(dict(list(SPACE.items())[:2]))
    for kind in range(COUNTS[name] + 6):
        trial = study.ask(SPACE)
        if kind % 5 == 3:
            study.tell(trial, state=TrialState.FAIL)
        elif kind % 5 == 4:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, figures(trial.params))
    study.tell(waiting, figures(waiting.params))
    assert study.ask(SPACE).params.keys() == SPACE.keys()


@pytest.mark.parametrize("name", ["tpe", "nsga2", "nsga3", "gp", "mutation"])
def test_limits_lead_the_draws_within(name):
    # Uniform draws are within in about one of sixteen cases.
    space = {f"layer{i}|prune": IntDistribution(0, 7) for i in range(6)}

    def excess(values):
        return sum(values.values()) / 12 - 1

    context = SamplerContext(constraints=lambda trial: (excess(trial.params),))
    study = open_study(name, context=context)
    rng = np.random.default_rng(0)
    for _ in range(40):
        values = {key: int(rng.integers(8)) for key in space}
        trial = create_trial(
            params=values,
            distributions=space,
            values=figures(values),
            system_attrs={"constraints": [excess(values)]},
        )
        study.add_trial(trial)
    # Two generations of a genetic algorithm, and some of the third.
    count = {"gp": 4, "nsga2": 140, "nsga3": 140}.get(name, 60)
    within = [excess(values) <= 0 for values in run(study, count, space)]
    assert np.mean(within[count * 3 // 4 :]) > 2 / 16


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="cmaes"):
        make_sampler("cmaes", 0, SamplerContext())
