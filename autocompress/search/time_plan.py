"""How a time limit is split between the phases of a search; pure, without a clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, final, get_args

Phase = Literal["set-up", "search", "survivors", "judging"]
PHASES: tuple[Phase, ...] = get_args(Phase)

# Of a time limit at most this share is kept for judging, and of what is left of it this one.
_LARGEST_JUDGING, _LARGEST_JUDGING_OF_LEFT = 0.25, 0.5
# Of what remains after the set-up.
_SURVIVORS = 0.45
# In less time all told, training comes to nothing.
_SHORTEST_TRAINED_S = 180.0
_LABELS: Mapping[Phase, str] = {"survivors": "training"}


@final
@dataclass(frozen=True)
class Demand:
    """What the phases need, as far as it is known.

    Attributes:
        final_s: about how long judging one finalist takes, as measured.
        finalists: how many are to be judged.
        trains: whether survivors can and shall be trained: there are training data.
    """

    final_s: float = 0.0
    finalists: int = 0
    trains: bool = False


@final
@dataclass(frozen=True)
class TimePlan:
    """When each phase of a search is to end, in seconds since its start.

    Judging is reserved first: what all finalists take, up to a quarter of the limit and half of
    what is left, yet never less than one finalist takes. Training survivors gets 45 % of what
    remained after the set-up, and the search, seeds included, the rest. A phase that ends
    early leaves its time to those after it; one that ends late takes it from the search, then from
    training, and from judging last.

    Attributes:
        total_s: the time limit, set-up and judging included; None is no limit.
        spent_s: seconds since the start when the last phase ended; at first the set-up, and all
            that earlier calls of the same search used.
        demand: what the phases need; `replace` it when more is known.
        ended: by phase how many seconds it took, in order; the set-up if left out.
    """

    total_s: float | None
    spent_s: float
    demand: Demand = Demand()
    ended: Mapping[Phase, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ended:
            object.__setattr__(self, "ended", {"set-up": self.spent_s})

    def after(self, phase: Phase, spent_s: float) -> TimePlan:
        """The plan once a phase has ended; those before it that did not run take no time.

        Args:
            phase: one that has not ended.
            spent_s: seconds since the start of the search.

        Raises:
            ValueError: the phase has ended before.
        """
        if phase in self.ended:
            raise ValueError(f"{phase} has ended before")
        skipped = {p: 0.0 for p in PHASES[: PHASES.index(phase)] if p not in self.ended}
        spent_s = max(spent_s, self.spent_s)
        ended = {**self.ended, **skipped, phase: spent_s - self.spent_s}
        return replace(self, spent_s=spent_s, ended=ended)

    def seconds(self, phase: Phase) -> float | None:
        """How long a phase took or is to take; None if that is not limited."""
        if phase in self.ended:
            return self.ended[phase]
        return None if self.total_s is None else self._planned(self.total_s)[phase]

    def deadline(self, phase: Phase) -> float | None:
        """When a phase ended or is to end, in seconds since the start; None without a limit.

        Never earlier than what is spent, unless the phase has ended.
        """
        if self.total_s is None:
            return None
        passed = PHASES[: PHASES.index(phase) + 1]
        if phase in self.ended:
            return sum(self.ended[p] for p in passed)
        planned = self._planned(self.total_s)
        return self.spent_s + sum(planned[p] for p in passed if p in planned)

    def rows(self) -> list[tuple[str, float | None]]:
        """Each phase's name as it is shown, and its seconds; those without any are left out."""
        found = [(_LABELS.get(p, p), self.seconds(p)) for p in PHASES]
        return [(name, seconds) for name, seconds in found if seconds != 0]

    def text(self) -> str:
        """One line, such as `plan for 20m: set-up 0:21, search 9:05, judging 2:00`."""
        if self.total_s is None:
            return "plan without a time limit"
        parts = [
            f"{name} {_clock(seconds)}" for name, seconds in self.rows() if seconds is not None
        ]
        return f"plan for {_duration(self.total_s)}: {', '.join(parts)}"

    def _planned(self, total_s: float) -> dict[Phase, float]:
        """Seconds of every phase that has not ended; together what is left, if any phase is."""
        left = max(0.0, total_s - self.spent_s)
        judging = self._judging(total_s, left)
        free = left - judging
        trained = "survivors" not in self.ended and self._trains(total_s)
        survivors = min(free, _SURVIVORS * max(0.0, total_s - self.ended["set-up"]))
        survivors = survivors if trained else 0.0
        if trained and "search" in self.ended:
            survivors = free
        wanted: dict[Phase, float] = {
            "search": free - survivors,
            "survivors": survivors,
            "judging": judging,
        }
        planned = {phase: wanted[phase] for phase in PHASES if phase in wanted}
        return {phase: s for phase, s in planned.items() if phase not in self.ended}

    def _judging(self, total_s: float, left: float) -> float:
        if "survivors" in self.ended or ("search" in self.ended and not self._trains(total_s)):
            return left
        one, every = self.demand.final_s, self.demand.final_s * self.demand.finalists
        most = min(_LARGEST_JUDGING * total_s, _LARGEST_JUDGING_OF_LEFT * left)
        return min(left, max(min(every, most), one if self.demand.finalists else 0.0))

    def _trains(self, total_s: float) -> bool:
        return self.demand.trains and total_s >= _SHORTEST_TRAINED_S


def _clock(seconds: float) -> str:
    """`8:40`, or `1:08:40` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _duration(seconds: float) -> str:
    """`20m`, `1h30m` or `90s`, as it may be given."""
    whole = round(seconds)
    if whole % 60 or not whole:
        return f"{whole}s"
    hours, minutes = divmod(whole // 60, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes else "")
