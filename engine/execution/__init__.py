"""The execution of sampling steps on a device: slots, kernels, compiled code and CUDA graphs."""
