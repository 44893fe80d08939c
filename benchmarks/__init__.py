"""Speed on this machine: ops and models, plans for GPUs, reports. Nothing in the package imports it."""
