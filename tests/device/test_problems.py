from __future__ import annotations

import emulation
import pretended
import pytest
import torch

import hesd_fast as hesd
from hesd_fast.hvp import ALL_STRATEGIES


def small_problem():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    batches = [(torch.randn(rows, 8), torch.randint(3, (rows,))) for rows in (20, 12)]
    return model, hesd.losses.supervised(torch.nn.functional.cross_entropy), batches


@pytest.mark.parametrize("hvp", [*ALL_STRATEGIES, "auto"])
def test_every_strategy(device, hvp):
    model, loss, batches = small_problem()
    options = {"max_steps": 12, "progress": False, "hvp": hvp}
    wanted = hesd.analyze(model, loss, batches, **options)
    assert emulation.engine().take_traffic() == (0, 0, 0)
    model = model.to(device)
    found = hesd.analyze(model, loss, batches, **options)
    assert sum(emulation.engine().take_traffic()) > 0
    assert found.lambda_max.value == pytest.approx(wanted.lambda_max.value, rel=1e-3)
    assert found.trace.value == pytest.approx(wanted.trace.value, rel=1e-3)
