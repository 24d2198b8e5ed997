"""What of JAX's own settings the engine can work with, said before anything runs."""

import jax
import numpy as np

from ssd_jax.errors import ConfigError


def check_jax_settings() -> None:
    """Refuse settings of the process under which our programs are others or do not trace.

    Raises:
        ConfigError: naming the setting and what to set it to.
    """
    if jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
        raise ConfigError(
            "The engine computes in 32 bits, but 64-bit JAX is on (jax_enable_x64, JAX_ENABLE_X64):"
            " switch it off in this process."
        )
    if jax.config.jax_numpy_rank_promotion == "raise":
        raise ConfigError(
            "The engine adds arrays of different ranks, but jax_numpy_rank_promotion "
            '(JAX_NUMPY_RANK_PROMOTION) is "raise": set it to "allow" in this process.'
        )


def first_device() -> jax.Device:
    """The device that JAX runs on unless told otherwise.

    Raises:
        ConfigError: JAX finds none, as when JAX_PLATFORMS names a plugin that is not installed.
    """
    try:
        return jax.devices()[0]
    except RuntimeError as error:
        raise ConfigError(
            f"JAX should find a device, but it says: {str(error).rstrip('.')}; set JAX_PLATFORMS "
            "to a platform that is installed, such as cpu, or unset it."
        ) from error
