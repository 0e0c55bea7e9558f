"""The table of what works."""

from __future__ import annotations

from collections.abc import Mapping

from passing import Outcome

from autocompress.errors import AutocompressError

_HEADER = """# What works

Architectures at tiny sizes with random weights; those with capitals are built from configurations
of transformers. Each was traced, solved, stitched at random plans and at the strongest ones,
exported and run. Written by `tests/zoo/test_zoo.py`: set `AUTOCOMPRESS_ZOO_RESULTS` to a file and
run `pytest -n 0 tests/zoo -m 'slow or not slow'`.

- layers: convolution and linear layers that can be changed, of those that there are
- groups: channel groups and attention heads that can be pruned, of those that there are
- blocks: residual blocks that can be taken out; there is a plan without all of them
- weights: share of the parameters that some technique can be applied to
- parity: largest difference between PyTorch and the float ONNX file over all plans, as a share of
  the largest output
- afresh: plans whose ONNX graph had to be exported anew, which takes seconds, since it holds
  channel counts as constants

| architecture | layers | groups | blocks | weights | plans | parity | afresh | first left alone |
|---|---|---|---|---|---|---|---|---|
"""


def results_table(found: Mapping[str, Outcome | AutocompressError]) -> str:
    """Markdown; networks in alphabetical order."""
    rows = [_row(name, found[name]) for name in sorted(found, key=str.lower)]
    return _HEADER + "\n".join(rows) + "\n"


def _row(name: str, outcome: Outcome | AutocompressError) -> str:
    if isinstance(outcome, AutocompressError):
        return f"| {name} | | | | | | | | **refused**: {outcome.what.splitlines()[0]} |"
    left = [row for row in outcome.inspection.modules if not row.techniques and _matters(row.kind)]
    reason = f"{left[0].name or 'the network itself'}: {left[0].reason}" if left else ""
    cells = (
        name, "{1} of {0}".format(*outcome.layers), "{1} of {0}".format(*outcome.groups),
        outcome.blocks,
        f"{100 * outcome.inspection.weight_share:.0f} %", outcome.plans, f"{outcome.parity:.1g}",
        outcome.afresh, reason.replace("|", "/"),
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _matters(kind: str) -> bool:
    return "norm" not in kind.lower() and kind != "PReLU"
