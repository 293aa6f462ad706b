"""Compiled programs, kept from one start to the next."""

import contextlib
import os
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compilation_cache() -> Iterator[None]:
    """Keeps compiled programs between starts; JAX_COMPILATION_CACHE_DIR says where."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(caches, "lineage_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    yield
