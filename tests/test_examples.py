"""The examples run, on real data where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import hesd_fast as hesd

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def fashion_mnist(monkeypatch):
    spec = importlib.util.spec_from_file_location("fashion_mnist", EXAMPLES / "fashion_mnist.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fashion_mnist", module)
    spec.loader.exec_module(module)
    return module


def test_fashion_mnist_end_to_end(fashion_mnist, tmp_path, capsys):
    if not fashion_mnist.DEBIAN_FOLDER.is_dir():
        pytest.skip(f"Fashion-MNIST is not installed in {fashion_mnist.DEBIAN_FOLDER} (dataset-fashion-mnist)")
    small = ["--epochs", "2", "--training-images", "3000", "--images", "60", "--max-steps", "8", "--block-size", "2"]
    fashion_mnist.main(["--out", str(tmp_path), *small])
    printed = capsys.readouterr().out
    assert "61,706 parameters" in printed
    assert "reference train:" in printed
    for split in ("train", "test"):
        report = hesd.load_report(tmp_path / f"{split}.hesd.json")
        assert report.cost.hvps == 16
        assert report.problem.terms == 60
        assert report.lambda_max.low > 0
        assert (tmp_path / f"{split}.png").stat().st_size > 0
    assert (tmp_path / "fashion_mnist.png").stat().st_size > 0


def test_fashion_mnist_says_how_to_get_the_data(fashion_mnist, tmp_path):
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.main(["--data", str(tmp_path)])
