"""All tests run on eight virtual CPU devices, with strict dtype promotion, long files first."""

import importlib.metadata
import os

flags = ["--xla_force_host_platform_device_count=8"]
# Programs here are compiled once and run for milliseconds.
flags += ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA aborts on a flag it has not
    flags += ["--xla_cpu_use_fusion_emitters=false"]
    # Workers fill the cores: a program that is compiled in parts at once only costs more in sum.
    flags += ["--xla_cpu_parallel_codegen_split_count=1"]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # the user's own is left alone

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")

# A file is one worker's, and none should be left alone with a long one at the end.
LONGEST = [
    "sharding",
    "cluster",
    "train",
    "lora",
    "sampling",
    "serve",
    "faults",
    "constrain",
    "plan",
]


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
