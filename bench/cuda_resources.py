"""Registers, stack and spills of every CUDA kernel, as ptxas reported them in the last build.

``make cuda-build`` builds, writes bench/results/cuda-resources.json and fails where a kernel spills or has a stack.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cuda-resources.json"
REPORTS = ROOT / "build" / "cuda-resources"
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<architecture>\w+)'\n"
    r".*Function properties for .*\n"
    r"\s*(?P<stack>\d+) bytes stack frame, "
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


def parse(text: str) -> list[dict[str, str | int]]:
    """Return what ptxas says of each kernel of one source."""
    found = []
    for match in ENTRY.finditer(text):
        entry = match.groupdict()
        numbers = ("registers", "shared", "stack", "spill_stores", "spill_loads")
        found.append(
            {
                "kernel": entry["kernel"],
                "architecture": entry["architecture"],
                **{name: int(entry[name] or 0) for name in numbers},
            }
        )
    return found


def demangled(names: list[str]) -> list[str]:
    """Return the names as C++ has them, without their arguments."""
    if shutil.which("c++filt") is None:
        return names
    lines = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    short = lines.replace("hesd::cuda::", "").replace("(anonymous namespace)::", "").replace("hesd::", "")
    return [re.sub(r"^void ", "", line).partition("(")[0] for line in short.splitlines()]


def wasteful(entries: list[dict[str, str | int]]) -> list[str]:
    """Return the kernels that spill registers or have a stack."""
    return [
        f"{entry['kernel']} ({entry['architecture']}): {entry['stack']} bytes of stack, "
        f"{entry['spill_stores']} stored and {entry['spill_loads']} loaded by spills"
        for entry in entries
        if entry["stack"] or entry["spill_stores"] or entry["spill_loads"]
    ]


def main() -> int:
    """Read the reports that the build left."""
    entries: list[dict[str, str | int]] = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        report = REPORTS / f"{source.stem}.txt"
        if not report.exists():
            print(
                f"cuda_resources.py: no report of {source.name} in {REPORTS}; was nvcc there when it was built?",
                file=sys.stderr,
            )
            return 1
        entries += [{"source": source.stem, **entry} for entry in parse(report.read_text(encoding="utf-8"))]
    if not entries:
        print("cuda_resources.py: the reports name no kernel", file=sys.stderr)
        return 1
    for entry, name in zip(entries, demangled([str(entry["kernel"]) for entry in entries]), strict=True):
        entry["kernel"] = name
    entries.sort(key=lambda entry: (entry["source"], entry["kernel"], entry["architecture"]))
    RESULTS.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    most = max(entries, key=lambda entry: entry["registers"])
    print(f"{len(entries)} kernels, at most {most['registers']} registers ({most['kernel']}, {most['architecture']})")
    for line in wasteful(entries):
        print(line, file=sys.stderr)
    return 1 if wasteful(entries) else 0


if __name__ == "__main__":
    sys.exit(main())
