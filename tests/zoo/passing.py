"""A network's way through the tool without training and measuring, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import hub_networks
import numpy as np
import onnx
import onnxruntime as ort
import own_networks
import torch
from networks import enliven, make_device
from torch import Tensor, nn

from autocompress import Split, Workload
from autocompress.bank import Bank
from autocompress.build import Builder
from autocompress.config import CalibrationSettings, SearchSpace
from autocompress.export.exporter import Exporter
from autocompress.graph import trace
from autocompress.graph.owners import find_owners
from autocompress.plan import Plan
from autocompress.search.arrange import arranged
from autocompress.search.inspection import Inspection, inspect_network
from autocompress.search.random_plans import random_plans
from autocompress.search.space import Space, build_space
from autocompress.workload import check_workload

SAMPLES = 16
SPACE = SearchSpace(
    version=1,
    name="zoo",
    techniques={
        "block_drop": {"drop": [True]},
        "filter_prune": {"pruning_ratio": [0.25, 0.5]},
        "low_rank": {"kind": ["svd", "spatial", "tucker"], "rank_ratio": [0.5, 0.25]},
        "weight_prune": {"sparsity": [0.5]},
        "precision": [
            {"weight_bits": [8], "activation_bits": [8], "activation_range": ["static", "dynamic"]},
            {"weight_bits": [4], "activation_bits": [32], "granularity": ["group"]},
        ],
        "codebook": {"code_bits": [4]},
    },
)


@dataclass(frozen=True, eq=False)
class Member:
    """A network of the zoo and inputs for it."""

    name: str
    network: nn.Module
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a network.

    Attributes:
        layers: how many there are, and how many of them may be changed.
        groups: how many channel groups there are, and how many can be pruned.
        blocks: how many blocks can be taken out.
        parity: the largest of all plans.
        afresh: how many of the plans needed an export of their own.
        inspection: what `autocompress inspect` says of the network.
    """

    name: str
    layers: tuple[int, int]
    groups: tuple[int, int]
    blocks: int
    plans: int
    afresh: int
    parity: float
    inspection: Inspection


def make_member(name: str) -> Member:
    own = name in own_networks.NETWORKS
    inputs = make_inputs((own_networks if own else hub_networks).NETWORKS[name][1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = own_networks.NETWORKS[name][0]() if own else hub_networks.build(name)
        enliven(network, inputs)
    return Member(name, network, inputs)


def make_inputs(shapes: tuple[tuple[int, ...] | int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randint(own_networks.VOCABULARY, (4 * SAMPLES, shape), generator=generator)
        if isinstance(shape, int)
        else torch.randn(4 * SAMPLES, *shape, generator=generator)
        for shape in shapes
    )


def pass_through(member: Member, folder: Path, plans: int = 2) -> Outcome:
    """Trace, solve, stitch, export and run random plans of a network.

    Raises:
        AutocompressError: the tool refuses the network, with its reason.
    """
    data = workload_of(member)
    check_workload(data)
    data = arranged(data)
    graph = trace(data.network, data.example_inputs)
    parity = tuple(x[:8] for x in data.calibration.inputs)
    exporter = Exporter(data.network, graph, data.example_inputs, parity)
    exporter.export(data.network)
    graph = graph.leaving(exporter.faults)
    device = make_device()
    space = build_space(graph, SPACE, device)
    settings = CalibrationSettings(statistics_samples=SAMPLES, repair_samples=SAMPLES)
    bank = Bank(data.network, graph, 1, folder / "bank")
    bank.calibrate(data.calibration.inputs, settings)
    builder = Builder(data, exporter, bank, device, settings, folder)
    chosen = (*random_plans(space, plans, np.random.default_rng(0)), *strongest(space))
    details = []
    for plan in chosen:
        artifact = builder.build(plan.hash, plan)
        details.append(artifact.details)
        _run(artifact.path, parity)
    return Outcome(
        member.name,
        (len(graph.layers), sum(x.compressible for x in graph.layers)),
        (len(graph.groups), sum(x.prunable for x in graph.groups)),
        len(graph.blocks),
        len(chosen),
        sum(d["exported_afresh"] for d in details),
        max(d["parity"] for d in details),
        inspect_network(
            graph, find_owners(data.network, data.example_inputs, graph), SPACE, device
        ),
    )


def strongest(space: Space) -> tuple[Plan, ...]:
    """The plan that does all that there is to each layer, as strongly as it can.

    Where there are blocks, also without them.
    """
    layers = space.plan({p.name: p.highest for p in space.parameters if not p.drops})
    every = space.plan({p.name: p.highest for p in space.parameters})
    return (layers,) if every == layers else (layers, every)


def workload_of(member: Member) -> Workload:
    parts = [
        Split(tuple(x[i * SAMPLES : (i + 1) * SAMPLES] for x in member.inputs)) for i in range(4)
    ]
    return Workload(
        network=member.network,
        example_inputs=tuple(x[:1] for x in member.inputs),
        calibration=parts[0],
        train=parts[1],
        search_split=parts[2],
        test_split=parts[3],
        metric=_no_metric,
    )


def _no_metric(outputs: object, targets: object) -> float:
    return 0.0


def _run(path: Path, inputs: tuple[Tensor, ...]) -> None:
    session = ort.InferenceSession(
        onnx.load(path).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    assert all(np.isfinite(output).all() for output in session.run(None, feed))
