"""What computes here."""

import jax


def platform() -> str:
    """One of "cpu", "gpu" and "tpu"; of a mesh whose devices need not exist, theirs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
