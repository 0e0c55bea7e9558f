"""A session whose model is compiled for the shapes of its inputs, anew for each combination."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import final

from autocompress.measure.session import Array, Session

Compiled = Callable[[Sequence[Array]], tuple[Array, ...]]

# The batch that is timed, and the one in which a split is predicted.
_KEPT = 2


@final
class ByShape(Session):
    """Compiles a model at the first run of each combination of input shapes; keeps the last two.

    Runtimes whose kernels are faster, or exist only, for fixed shapes load files this way.

    Args:
        input_names: the model's inputs, in order.
        compile_for: makes the model that takes inputs like those given.
    """

    def __init__(
        self, input_names: tuple[str, ...], compile_for: Callable[[Sequence[Array]], Compiled]
    ) -> None:
        self._names = input_names
        self._compile_for = compile_for
        self._compiled: OrderedDict[tuple[object, ...], Compiled] = OrderedDict()

    @property
    def input_names(self) -> tuple[str, ...]:
        """The model's inputs, in the file's order."""
        return self._names

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Run once, after compiling if the shapes are new.

        Raises:
            ValueError: a wrong number of inputs.
            Exception: whatever the runtime raises.
        """
        if len(inputs) != len(self._names):
            raise ValueError(f"{len(inputs)} inputs for {', '.join(self._names)}")
        key = tuple((array.shape, array.dtype.str) for array in inputs)
        if key not in self._compiled:
            # The oldest goes first, so that memory never holds one more.
            while len(self._compiled) >= _KEPT:
                self._compiled.popitem(last=False)
            self._compiled[key] = self._compile_for(inputs)
        self._compiled.move_to_end(key)
        return self._compiled[key](inputs)
