"""Many architectures through the tool: each is compressed, or refused with a reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hub_networks
import own_networks
import pytest
from passing import Outcome, make_member, pass_through
from results import results_table

from autocompress.errors import AutocompressError
from autocompress.export.exporter import PARITY_TOLERANCE

# What the zoo is known to be refused for, by a part of the reason.
REFUSED: dict[str, str] = {}
# One of each kind that needs care, for every run of the tests.
FEW = (
    "detector",
    "functional",
    "lstm",
    "multihead_attention",
    "repeated",
    "squeeze_excite",
    "tied_embedding",
)
ALL = (*own_networks.NETWORKS, *hub_networks.NETWORKS)

Results = dict[str, Outcome | AutocompressError]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Gathers what came of each network, and writes the table at the end."""
    found: Results = {}
    yield found
    place = os.environ.get("AUTOCOMPRESS_ZOO_RESULTS")
    path = Path(place) if place else tmp_path_factory.mktemp("zoo") / "RESULTS.md"
    path.write_text(results_table(found), encoding="utf-8")


def _pass(name: str, folder: Path, results: Results) -> None:
    if name in hub_networks.NETWORKS:
        pytest.importorskip("transformers", reason="builds architectures of transformers")
    try:
        outcome = pass_through(make_member(name), folder)
    except AutocompressError as reason:
        results[name] = reason
        assert REFUSED.get(name, "?") in str(reason), reason
        return
    results[name] = outcome
    assert name not in REFUSED
    assert outcome.plans >= 2
    assert outcome.parity <= PARITY_TOLERANCE
    # Whatever nothing can be done to has its reason.
    for row in (*outcome.inspection.modules, *outcome.inspection.groups):
        assert row.techniques or row.reason, row


@pytest.mark.parametrize("name", FEW)
def test_a_few_architectures(name: str, tmp_path: Path, results: Results) -> None:
    _pass(name, tmp_path, results)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in FEW])
def test_every_other_architecture(name: str, tmp_path: Path, results: Results) -> None:
    _pass(name, tmp_path, results)
