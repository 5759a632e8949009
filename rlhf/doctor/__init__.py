"""Whether this machine is ready: `rlhf doctor`."""
