from __future__ import annotations

import copy
import pickle

from hypothesis import given
from hypothesis import strategies as st

from autocompress.search.cluster.explorer import Crew
from autocompress.search.cluster.study_search import Pump, StudySearch
from autocompress.search.cluster.unkept import Unkept


@given(st.integers(1, 512), st.integers(1, 8), st.booleans())
def test_a_crew_fits_into_its_cluster(cpus: int, nodes: int, coded: bool) -> None:
    crew = Crew.of(float(cpus), nodes, coded=coded)
    assert crew.judges >= 1 and crew.trials >= 2 * nodes
    assert 0 < crew.cpus <= 1
    assert (crew.judges + crew.trials) * crew.cpus <= cpus + 1e-9
    # Large clusters are not filled with what is of no use.
    assert crew.judges <= 4 * crew.trials


def test_what_tune_is_given_is_neither_copied_nor_kept() -> None:
    class Source:
        def pump(self) -> None:
            raise AssertionError

    pump = Pump(Source().pump)
    assert copy.deepcopy(pump) is pump
    assert type(pickle.loads(pickle.dumps(pump))) is Unkept
    search = StudySearch(Source(), {"metric": "max", "latency": "min"})  # type: ignore[arg-type]
    assert copy.deepcopy(search) is search
    assert type(pickle.loads(pickle.dumps(search))) is Unkept


@given(st.integers(2, 64), st.integers(1, 200), st.integers(1, 4), st.booleans())
def test_judges_leave_room_for_a_candidate(cpus: int, now: int, nodes: int, coded: bool) -> None:
    """Nodes that are lost take judges with them, not what is measured; new ones bring some."""
    crew = Crew.of(float(cpus), nodes, coded=coded)
    judges = crew.judges_now(float(now))
    assert judges >= 1
    assert judges == 1 or (judges + 1) * crew.cpus <= now + 1e-6
    assert crew.judges_now(float(cpus)) == crew.judges
