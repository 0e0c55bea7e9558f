"""Reductions over axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from autocompress.measure.runtimes.torch_graph.node import Node, Run

# A tensor, axes, whether they are kept.
Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduction(function: Reduce) -> Callable[[Node], Run]:
    def make(node: Node) -> Run:
        rank, keep = len(node.shape(0)), bool(node.value("keepdims", 1))
        axes = node.ints("axes", 1)
        if not axes and node.value("noop_with_empty_axes", 0):
            return lambda x, *_: x
        found = tuple(axis % rank for axis in axes) if axes else tuple(range(rank))
        return lambda x, *_: function(x, found, keep)

    return make


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.mean(x, axes, keep)


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    # Without a type, sums of integers would be of 64 bits.
    return torch.sum(x, axes, keep, dtype=x.dtype)


def _max(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.amax(x, axes, keep)


def _min(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.amin(x, axes, keep)


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    # From the back, so that the axes in front keep their numbers.
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _l1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keep)
    return norm


def _sum_square(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x, axes, keep).log()


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep)


def _position(function: Callable[..., Tensor]) -> Callable[[Node], Run]:
    """The place of the largest or smallest value."""

    def make(node: Node) -> Run:
        axis, keep = node.axis(0), bool(node.value("keepdims", 1))
        if node.value("select_last_index", 0):
            raise node.refused("select_last_index is not covered")
        return lambda x: function(x, axis, keepdim=keep)

    return make


def _top_k(node: Node) -> Run:
    axis, counts = node.axis(-1), node.ints("k", 1)
    if not counts:
        raise node.refused("it does not say how many")
    largest, ordered = bool(node.value("largest", 1)), bool(node.value("sorted", 1))

    def run(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        found = torch.topk(x, counts[0], axis, largest, ordered)
        return found.values, found.indices

    return run


def _cumulative_sum(node: Node) -> Run:
    axis = node.constant_ints(1)[0]
    if node.value("exclusive", 0) or node.value("reverse", 0):
        raise node.refused("exclusive and reverse sums are not covered")
    return lambda x, *_: torch.cumsum(x, axis, dtype=x.dtype)


REDUCTIONS: Final[Mapping[str, Callable[[Node], Any]]] = {
    "ArgMax": _position(torch.argmax),
    "ArgMin": _position(torch.argmin),
    "CumSum": _cumulative_sum,
    "ReduceL1": _reduction(_l1),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(_log_sum),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(_max),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_min),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum_square),
    "TopK": _top_k,
}
