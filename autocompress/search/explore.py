"""The search on this machine: plans are judged beside the device while it measures.

This process proposes, judges and builds on the cores that do not measure; one thread hands finished
files to the device, one after another.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from autocompress.build import Stopwatch
from autocompress.errors import DeviceError
from autocompress.evaluate import Device
from autocompress.evaluation import Evaluation
from autocompress.search.agenda import POOL, Agenda, Task, reason_of
from autocompress.search.context import SearchContext
from autocompress.search.judge import Sample

# Built files that wait for the device: one, so that it is never idle.
_AHEAD = 2
# How much the networks of judged plans may take together.
_POOL_BYTES = 1 << 29
_WAIT_S = 1.0


@final
@dataclass
class _UnderWay:
    """A candidate that was handed to the device."""

    task: Task
    future: Future[Evaluation]


@final
class Explorer:
    """Keeps the device busy with the most promising plans.

    Args:
        context: builds and measures.
        agenda: says what is next.
        sample: what plans are judged on.
    """

    def __init__(self, context: SearchContext, agenda: Agenda, sample: Sample) -> None:
        self._context, self._agenda, self._sample = context, agenda, sample
        self._networks: dict[str, nn.Module] = {}
        self._under_way: deque[_UnderWay] = deque()

    def run(self) -> None:
        """Search until nothing is allowed any more or no new plan is found.

        Raises:
            SearchError: too many candidates failed in a row.
            DeviceError: the device is not there any more; the trial is tried again later.
        """
        while True:
            self.keep_busy()
            if self._agenda.over:
                break
            if self._agenda.judges:
                self._judge_one()
            elif self._under_way:
                self._wait()
        self._agenda.close()
        self._networks.clear()

    def keep_busy(self) -> None:
        """Take in what is finished, and build candidates that the device will need."""
        self._take_in_finished()
        while len(self._under_way) < _AHEAD:
            task = self._agenda.next_to_build()
            if task is None:
                break
            self._build(task)

    def _judge_one(self) -> None:
        proposal = self._agenda.next_to_judge()
        if proposal is None:
            return
        try:
            tried = self._context.evaluator.builder.network(proposal.plan, Stopwatch())
            seen = [self._sample.first(tried)]
            judgement = self._agenda.judge(proposal, seen)
            if self._agenda.promises(judgement):
                # Worth a second look.
                seen.append(self._sample.further(tried.network))
                judgement = self._agenda.judge(proposal, seen)
        except (DeviceError, OSError):
            raise
        except Exception as cause:
            self._agenda.unjudgeable(proposal, reason_of(cause), cause)
            return
        self._agenda.judged(proposal, judgement)
        if POOL * _bytes_of(tried.network) <= _POOL_BYTES:
            self._networks[proposal.candidate] = tried.network
        waiting = self._agenda.waiting
        self._networks = {name: n for name, n in self._networks.items() if name in waiting}

    def _build(self, task: Task) -> None:
        proposal = task.proposal
        network = self._networks.pop(proposal.candidate, None)
        try:
            artifact = self._context.evaluator.artifact(proposal.plan, network)
        except (DeviceError, OSError):
            # The machine's fault, not the plan's: the trial stays open and is tried again.
            raise
        except Exception as cause:
            # Whatever one plan does to PyTorch must not end a search of hours.
            self._agenda.failed(task, reason_of(cause), cause)
            return
        future = self._context.measure(artifact, proposal.plan, proposal.runtime)
        self._under_way.append(_UnderWay(task, future))

    def _wait(self) -> None:
        wait([self._under_way[0].future], timeout=_WAIT_S)
        self._take_in_finished()

    def _take_in_finished(self) -> None:
        while self._under_way and self._under_way[0].future.done():
            self._take_in(self._under_way.popleft())

    def _take_in(self, done: _UnderWay) -> None:
        cause = done.future.exception()
        if cause is None:
            self._agenda.measured(done.task, done.future.result())
        elif isinstance(cause, Exception) and not isinstance(cause, (DeviceError, OSError)):
            self._agenda.failed(done.task, reason_of(cause), cause)
        else:
            raise cause


def _bytes_of(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


@contextmanager
def beside_the_device(device: Device, cores: tuple[int, ...]) -> Iterator[None]:
    """Keep this process's computing off the cores that measure, if there are others.

    Args:
        cores: those that the device gives.
    """
    before = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    own = before
    if device.profile.kind == "cpu" and device.host.here:
        own = before - set(device.profile.pinned_cores(cores)) or before
    try:
        os.sched_setaffinity(0, own)
        torch.set_num_threads(max(1, min(threads, len(own))))
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
