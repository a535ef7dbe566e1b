"""What the benchmarks share: measuring in turn, peaks of memory, waits for the device, tables and files of results."""

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: times are those of one thread

import torch

RESULTS = Path(__file__).parent / "results"


def parser(script: str, description: str, repeats: int) -> argparse.ArgumentParser:
    """The flags that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, with the CPU time of one thread, or cuda")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds, of which the medians are taken")
    parser.add_argument("--output", help=f"where to write the numbers; by default results/{Path(script).stem}.json")
    return parser


def environment(device: str, *packages: str) -> dict:
    """Versions, hardware, and how busy it is (the load of the last minute)."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    versions = {package: version(package) for package in ("aligndet-hf", "numpy", "torch", *packages)}
    found = {"python": platform.python_version(), **versions}
    found |= {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def now(device: str) -> float:
    """Seconds of CPU time of this process, which other processes change less than the clock; on a GPU the clock."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(functions: dict[str, Callable], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """
    Seconds that each function takes, round by round.

    Every function is called once a round, so that a change of the machine's speed meets all of them, after one call
    that does not count.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = now(device)
            function()
            times[name].append(now(device) - start)
    return times


def times_faster(times: dict[str, list[float]], fast: str, slow: str) -> float:
    """Median over the rounds of how many times faster one function is than the other."""
    return statistics.median(b / a for a, b in zip(times[fast], times[slow], strict=True))


def peak_memory(function: Callable, device: str = "cpu") -> int:
    """Bytes that a call allocates at most, beyond those allocated before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    allocated = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def waits(function: Callable, device: str) -> int | None:
    """How often a call makes the CPU wait for the GPU; `None` on a CPU."""
    if device == "cpu":
        return None
    function()
    synchronize, unfinished = torch.cuda.Event.synchronize, []

    def counted(event: torch.cuda.Event) -> None:  # torch counts none of these
        if not event.query():
            unfinished.append(event)
        synchronize(event)

    with warnings.catch_warnings(record=True) as caught, mock.patch.object(torch.cuda.Event, "synchronize", counted):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        function()
        torch.cuda.set_sync_debug_mode("default")
    return len(unfinished) + sum("synchroniz" in str(warning.message) for warning in caught)


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """The median of every function, in milliseconds."""
    return {name: {"milliseconds": 1000 * statistics.median(values)} for name, values in times.items()}


def table(rows: dict[str, dict]) -> str:
    """Rows of numbers as text, under the names of their columns."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{column:>{len(column) + 4}}" for column in columns)]
    for name, row in rows.items():
        cells = [f"{_text(row.get(column)):>{len(column) + 4}}" for column in columns]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _text(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(script: str, arguments: argparse.Namespace, results: dict, *packages: str) -> dict:
    """Print the results, rows of a table first, and write them with the environment to a JSON file."""
    print(table(results["rows"]))
    for name, value in results.items():
        if name != "rows":
            print(
                f"{name}: {json.dumps(json.loads(json.dumps(value), parse_float=lambda x: float(f'{float(x):.3g}')))}"
            )
    suffix = "" if arguments.device == "cpu" else f"_{arguments.device}"
    output = arguments.output or RESULTS / f"{Path(script).stem}{suffix}.json"
    return save(output, {"environment": environment(arguments.device, *packages), **results})


def save(output: str | Path, results: dict) -> dict:
    """Write the results to a JSON file, and return them."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results
