"""Before JAX is imported: tests and doctests run on the CPU, as eight devices, so that sharding is tested everywhere.

This file lies at the root because the doctests in `lora_jax/` need it as much as `tests/` does. Processes that tests
start (notebooks, the command line) inherit it. Flags that XLA_FLAGS already holds win.
"""

import gc
import importlib.metadata
import os
import sys

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before conftest.py could choose its platform: is it a pytest plugin's doing?")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        # Tests compile much and compute little: without LLVM's optimizations they take a third less CPU time.
        # (Fewer intra-op threads per worker were measured too, and change nothing.)
        "--xla_backend_optimization_level=0",
        # A program compiled in one part instead of many, as both cores are busy anyway: a tenth less.
        "--xla_cpu_parallel_codegen_split_count=1",
        # Its former emitters take a third of the time again. Later releases have them no more, and refuse the flag.
        *(["--xla_cpu_use_fusion_emitters=false"] if importlib.metadata.version("jaxlib").startswith("0.10.") else []),
        os.environ.get("XLA_FLAGS", ""),
    ]
).strip()

# The eight devices share one pool of threads, as large as this where it is more. Were it of eight, programs that run at
# the same time could each keep some of the threads and wait for the others in a collective, for ever.
os.environ.setdefault("PJRT_NPROC", "32")

gc.set_threshold(20_000, 20, 20)  # tracing allocates much and frees it all by counting references
