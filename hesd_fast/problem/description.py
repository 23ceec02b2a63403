"""What a problem is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hesd_fast.problem.model_state import alone
from hesd_fast.problem.parameters import ParameterLayout, norm_of
from hesd_fast.problem.term_counts import Count

Loss = Callable[[Any, Any], Any]

_SAME_IN_EVERY_MODE = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm)


class ProblemDescription(ParameterLayout):
    """A model, a loss, data, and the parameters that the loss is a function of; see :class:`~hesd_fast.Problem`.

    Parameters
    ----------
    data : iterable
        Yields batches, the same each time.
    parameters : dict
        The selected parameters by name.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Any,
        parameters: dict[str, nn.Parameter],
        mode: str,
        count: Count | None,
    ) -> None:
        super().__init__(parameters)
        self.model = model
        self.loss = loss
        self.data = data
        self.mode = mode
        self.count = count

    @property
    def device(self) -> torch.device:
        """Where the selected parameters, and so the panels, are."""
        return next(iter(self.parameters.values())).device

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest selected parameter, which limits the accuracy of products."""
        return max(torch.finfo(parameter.dtype).eps for parameter in self.parameters.values())

    @property
    @alone
    def parameter_norm_squared(self) -> float:
        """Squared Euclidean norm of the selected parameters, summed in float64."""
        return norm_of(parameter.detach() for parameter in self.parameters.values()) ** 2

    def likely_causes(self) -> str:
        """Return what may make the loss change from one evaluation to the next, as words of a message."""
        suspects = [
            f"{name} ({type(module).__name__})"
            for name, module in self.model.named_modules()
            if (module.training if self.mode == "as_is" else self.mode == "train")
            and any(word in type(module).__name__ for word in ("Drop", "Norm"))
            and not isinstance(module, _SAME_IN_EVERY_MODE)
        ]
        causes = "likely causes are a random generator of its own, or a counter that forward or loss keeps; remove them"
        # The dropout and norms of PyTorch are the same at every pass: streams and buffers are put back.
        return f"{causes}, or use mode='eval' for {', '.join(suspects[:3])}" if suspects else causes
