"""Hessian eigenvalue spectral densities of PyTorch models."""
