"""Account for the time from the start of a training run to its first step."""

import time


class StartTimes:
    """The seconds of each phase, in the order in which the phases ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def end(self, phase: str) -> None:
        """Note how long a phase took, which began when the one before it ended. A repeated phase is added up."""
        now = time.monotonic()
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._since, 1)
        self._since = now

    def __str__(self) -> str:
        """A phrase such as `12 s to the first step: starting Ray 2 s, loading the model 3 s`."""
        phases = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self.seconds.items() if seconds >= 0.5)
        return f"{sum(self.seconds.values()):.0f} s to the first step" + (f": {phases}" if phases else "")
