"""Eigenpairs against known spectra, dense eigensolvers, SciPy and the Hessian of a network."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from matrices import laplacian_1d, laplacian_2d, with_spectrum
from scipy.sparse.linalg import eigsh as scipy_eigsh

import hesd_fast as hesd
from hesd_fast.engine import kernels
from hesd_fast.estimators.thick_restart import combine_in_place

DTYPES = [torch.float64, torch.float32]
WHICH = ["LA", "SA", "LM", "BE"]
