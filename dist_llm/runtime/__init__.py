"""Where the process meets the machine: ranks, environment, devices, process groups, seeds and logs live here alone."""
