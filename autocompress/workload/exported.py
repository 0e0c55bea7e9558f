"""A `torch.export.ExportedProgram` as a network of modules, which is what can be compressed.

An exported program is a flat graph of functions. Those whose weights are parameters become the
modules that they were, or could have been; everything else stays as it is. So do numbers of heads
and channels that the program holds as shapes: such groups cannot be pruned.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from autocompress.errors import WorkloadError
from autocompress.workload.inputs import describe
from autocompress.workload.network import flatten_tensors
from autocompress.workload.raised import Raised, arguments_of, raised_from

_TOLERANCE = 1e-4
_CHECKS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "_assert_async"})
_CALL = "call_function"
_FIXED = "sym_constrain_range"
# What is left of checks of sizes once they are gone.
_SIZES = frozenset(
    {operator.eq, operator.ge, operator.le, operator.gt, operator.lt, operator.ne, operator.and_}
)


def raise_layers(
    program: ExportedProgram, example_inputs: tuple[Tensor, ...], names: tuple[str, ...]
) -> nn.Module:
    """The network of an exported program, with its layers as modules.

    Modules are named after the owners of their parameters. Weights that several functions share
    are shared by their modules; calls with the same parameters and settings are one module.

    Args:
        example_inputs: on which both are compared, batch in dimension 0.
        names: keywords for the inputs; none to hand them on by position.

    Returns:
        A network in evaluation mode that gives a tensor, or a flat tuple of them.

    Raises:
        WorkloadError: the program is fixed to a batch size, was exported in training mode, has no
            layers, does not run, or the network does not give what it gives.
    """
    _check_inputs(program)
    source = program.module(check_guards=False)
    _check_mode(source.graph)
    network = _rebuilt(source)
    _check_outputs(source, network, example_inputs, names)
    return network


def _check_inputs(program: ExportedProgram) -> None:
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name not in program.graph_signature.user_inputs or not isinstance(value, Tensor):
            continue
        if value.ndim == 0 or isinstance(value.shape[0], int):
            raise WorkloadError(
                "The exported program is fixed to a batch size; candidates are judged in batches.",
                given=f"input {node.name} of shape {tuple(value.shape)}",
                allowed="inputs whose dimension 0 is the batch, and free",
                advice="export it with a free batch: torch.export.export(network, inputs, "
                'dynamic_shapes=({0: torch.export.Dim("batch")}, ...)), one entry per input; use '
                "example inputs with two samples or more",
            )


def _check_mode(graph: fx.Graph) -> None:
    for node in graph.nodes:
        arguments = arguments_of(node)
        if arguments.get("training") is True or arguments.get("train") is True:
            raise WorkloadError(
                "The exported program is in training mode.",
                given=f"{node.target} in {node.name}",
                allowed="a program of a network in eval mode",
                advice="call network.eval() before torch.export.export",
            )


def _rebuilt(source: fx.GraphModule) -> nn.Module:
    graph = fx.Graph()
    # Under plain code generation: inputs and outputs are flat.
    output = graph.graph_copy(source.graph, {})
    graph.output(tuple(node for node in _flat(output) if isinstance(node, fx.Node)))
    found = raised_from(graph, source)
    if not found:
        raise WorkloadError(
            "The exported program holds no layer whose weights are parameters.",
            given=", ".join(sorted({str(n.target) for n in graph.nodes if n.op == _CALL})[:6]),
            allowed="linear, convolution, norm or embedding calls, as torch.export gives them",
            advice="give the program before run_decompositions()",
        )
    for node, raised in found.items():
        _replace(graph, node, raised)
    _clean(graph)
    held: dict[str, Any] = {raised.name: raised.module for raised in found.values()}
    for node in graph.find_nodes(op="get_attr"):
        held.setdefault(str(node.target), operator.attrgetter(str(node.target))(source))
    _single(graph)
    graph.lint()
    network = fx.GraphModule(held, graph, "ExportedNetwork")
    return network.eval()


def _replace(graph: fx.Graph, node: fx.Node, raised: Raised) -> None:
    with graph.inserting_before(node):
        # Of now: what it reads may have been replaced before.
        call = graph.call_module(raised.name, (arguments_of(node)[raised.reads],))
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _clean(graph: fx.Graph) -> None:
    """Take out checks of what was true at export, inputs that nothing reads, and notes."""
    for node in reversed(graph.nodes):
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if not node.users and (name in _CHECKS or name.startswith(_FIXED)):
            graph.erase_node(node)
    graph.eliminate_dead_code(
        lambda node: not (node.op == "get_attr" or node.target in _SIZES or _is_size(node))
    )
    for node in graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta.get("val"), Tensor):
            if node.users:
                raise WorkloadError(
                    "The exported program has an input that is no tensor.",
                    given=f"{node.name}: {describe(node.meta.get('val'))}",
                    allowed="tensors with the batch in dimension 0",
                    advice="export a network that has such arguments as attributes",
                )
            graph.erase_node(node)
    for node in graph.nodes:
        node.meta = {}


def _single(graph: fx.Graph) -> None:
    """One output stands alone."""
    (output,) = graph.find_nodes(op="output")
    if len(output.args[0]) == 1:
        output.args = (output.args[0][0],)


def _is_size(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


def _flat(value: object) -> list[object]:
    if isinstance(value, (tuple, list)):
        return [item for part in value for item in _flat(part)]
    if isinstance(value, Mapping):
        return _flat(list(value.values()))
    return [value]


def _check_outputs(
    source: nn.Module, network: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str]
) -> None:
    named = dict(zip(names, inputs, strict=True)) if names else {}
    positional = () if names else inputs
    try:
        with torch.no_grad():
            expected, found = (
                flatten_tensors(each(*positional, **named)) for each in (source, network)
            )
    except Exception as cause:
        raise WorkloadError(
            "The exported program does not run on example_inputs: "
            f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}",
            given=describe(named or inputs),
            allowed="inputs of the shapes and names that it was exported with, in any batch",
            advice="give example_inputs as a mapping if it was exported with keyword arguments",
        ) from cause
    for wanted, got in zip(expected, found, strict=True):
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        if wanted.shape != got.shape or not torch.allclose(
            got.double(), wanted.double(), _TOLERANCE, _TOLERANCE * scale, equal_nan=True
        ):
            raise WorkloadError(
                "The exported program could not be turned into modules: the outputs differ.",
                given=f"{describe(got)} and {describe(wanted)}",
                advice="give the torch.nn.Module that it was exported from",
            )
