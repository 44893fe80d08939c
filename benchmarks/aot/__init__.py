"""Every kernel compiled for four architectures, without a GPU."""
