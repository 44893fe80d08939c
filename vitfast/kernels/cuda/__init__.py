"""Launchers of the CUDA kernels of csrc/cuda."""
