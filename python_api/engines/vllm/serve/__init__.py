"""vLLM's server with the chains in its engine core: `power-kernels serve`. See docs/serve.md."""
