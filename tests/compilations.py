"""What Triton would compile for the launches of a kernel, told by its own cache keys; nothing is compiled or run."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature


class Compilations:
    """Stands in for a kernel: notes what Triton would compile for every launch, and launches nothing."""

    def __init__(self, kernel, *, careless: bool = False) -> None:
        jitted = JITFunction(kernel.fn, **({} if careless else kernel.kwargs))
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(jitted.signature, jitted.params, backend)
        self.keys: set[str] = set()

    def __getitem__(self, grid):
        def launch(*given, **named):
            _, specialization, options = self.bind(*given, **named)
            self.keys.add(compute_cache_key({}, specialization, options))

        return launch
