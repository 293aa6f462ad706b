"""Eight CPU devices, strict promotion, and XLA told to compile fast, not well."""

import gc
import os
from importlib import metadata

flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # the other cores have workers of their own
]
if metadata.version("jaxlib") < "0.11":  # later releases have one emitter, and refuse the flag
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

import pytest  # noqa: E402

from tests.parity_table import (  # noqa: E402, F401
    kept_errors,
    pytest_runtest_logreport,
    pytest_sessionfinish,
)

LONGEST = (
    "test_properties.py",
    "test_notebooks.py",
    "test_claims.py",
    "test_sweep.py",
    "test_faults.py",
    "test_multi30k.py",
)
"""Files that take minutes: they begin first, so that no worker waits for another at the end."""


def pytest_addoption(parser):
    parser.addoption("--parity-table", help="where to write the table of parity")
    parser.addoption(
        "--whole-notebooks", action="store_true", help="train as long as notebooks say"
    )


def pytest_collection_finish():
    """Traces make many objects and little garbage: it is looked for less often, not in modules."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_collection_modifyitems(items):
    first = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.fixture(scope="session")
def process_environment(tmp_path_factory):
    """For a process of its own: one device, the same fast compiles, and those kept for the next."""
    return {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
