"""The Triton kernels: forward, backward and the choice of their tiles."""
