"""How the child processes of one step are run: limits, threads, and the lock they inherit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmint.isolate import Limits, Outcome, Progress, call


@dataclass(frozen=True)
class Sandbox:
    """Runs functions of ours in child processes, all under the same conditions.

    Attributes:
        threads: what tools may use.
        limits: wall-clock and memory of each child.
        lock: descriptor of the step's lock; None outside of a step.
        require_isolation: refuse to run where the child cannot be cut off from the network.
        on_progress: told how far the child is.
    """

    threads: int
    limits: Limits
    lock: int | None = None
    require_isolation: bool = False
    on_progress: Callable[[Progress], None] | None = None

    def call(
        self,
        function: str,
        arguments: Mapping[str, Any],
        *,
        python_path: tuple[Path, ...] = (),
        cwd: Path | None = None,
    ) -> Outcome:
        """Run ``module:function`` with keyword arguments in a child without network.

        Raises:
            ToolError: if the child crashed, hung or answered nothing.
            ResourceError: if it went over a limit.
        """
        return call(
            function,
            arguments,
            limits=self.limits,
            keep_fds=() if self.lock is None else (self.lock,),
            python_path=python_path,
            on_progress=self.on_progress,
            require_isolation=self.require_isolation,
            environment={"OMP_NUM_THREADS": str(self.threads)},
            cwd=cwd,
        )
