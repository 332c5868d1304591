"""Interleaved timing: every function sees the same machine, so ratios of medians hold where absolute times drift."""

import statistics
import time
from collections.abc import Callable


def interleaved(
    functions: dict[str, Callable[[], object]],
    repeats: int = 21,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds per call of each function, all of them timed in turn.

    Round r calls every function once, starting with function r % n, so that none always runs in the shadow of the same
    neighbour. `warmup` rounds run first and are not counted. The clock gives wall time, or with `time.process_time` the
    processor time of the process, which other processes disturb less.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(-warmup, repeats):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            functions[name]()
            elapsed = clock() - start
            if round_number >= 0:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}
