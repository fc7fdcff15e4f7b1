"""Single-device PyTorch models: no rank, no mesh, no process group, no environment, no device name."""
