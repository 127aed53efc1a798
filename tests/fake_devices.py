"""What XLA is told before a test or a process of one starts JAX."""


def fake_devices(count: int) -> str:
    """The value of XLA_FLAGS for so many CPU devices, compiled without LLVM's optimisations.

    Nearly all of the tests' time is compiling; programs this small run as fast without.
    """
    return f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
