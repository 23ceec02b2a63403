"""Where numbers that are not finite come from."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

_OPERATION = re.compile(r"(?:Error detected in|induced by) (?P<name>\w+?)Backward\d*\.")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in .*\n\s+(?P<code>.+)')

_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def cause_of_nan(multiply: Callable[[], None]) -> str:
    """Return which operation makes a product not a number, and in which line of code; "" if none does.

    Parameters
    ----------
    multiply : callable
        Makes the product anew, with graphs of its own. Cost: a product, several times as slow as usual.
    """
    with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        with contextlib.suppress(Exception):  # what it says stands in the warnings as well, with the place
            multiply()
    matches = [match for warning in caught if (match := _OPERATION.search(str(warning.message)))]
    if not matches:
        return ""
    # Where a backward pass is differentiated, the last of them is about the forward pass that it belongs to.
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", matches[-1]["name"]).lower()
    frames = [frame for frame in _FRAME.finditer(matches[-1].string) if not frame["file"].startswith(_OURS)]
    order = "second derivative" if len(matches) > 1 else "derivative"
    found = f"the {order} of {name} is not a number there"
    if not frames:
        return found
    return f"{found}, in `{frames[-1]['code'].strip()}` ({Path(frames[-1]['file']).name}, line {frames[-1]['line']})"
