"""In the place of SGLang's compiled kernels, of which there is no build for CPUs: all of them can be imported, and one
that is called says its name."""


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} has no build for CPUs")

    return kernel
