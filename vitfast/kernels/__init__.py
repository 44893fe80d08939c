"""What computes in place of stock operators: Triton and CUDA kernels on GPUs, C++ on CPUs."""
