from __future__ import annotations

from networks import graph_of, make_device

from autocompress.graph.groups import kept_size
from autocompress.techniques.filter_prune import FILTER_PRUNE, FilterPrune


def test_each_channel_count_is_offered_once_and_the_full_one_never() -> None:
    group = graph_of("residual").group("stem+1")
    offers = [FilterPrune(pruning_ratio=r / 20) for r in range(20)]
    for multiple, sizes in ((1, [7, 6, 5, 4, 3, 2, 1]), (4, [4]), (8, [])):
        device = make_device(channel_multiple=multiple)
        chosen = FILTER_PRUNE.choices(group, offers, device)
        assert [kept_size(8, d.pruning_ratio, multiple) for d in chosen] == sizes  # type: ignore[attr-defined]


def test_groups_that_cannot_be_pruned_are_offered_nothing() -> None:
    group = graph_of("residual").group("head")
    assert FILTER_PRUNE.choices(group, [FilterPrune(pruning_ratio=0.5)], make_device()) == ()
