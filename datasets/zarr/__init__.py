"""Zarr: our own stores, and replay buffers of diffusion_policy."""
