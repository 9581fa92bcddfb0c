"""Microbenchmarks of the operators on a CPU or a CUDA device: `power-kernels bench`, and bench/ in the repository.

`harness` measures; `chain`, `logits`, `lm_head`, `kv_cache` and `paged_kv` say what: a suite an operator, its byte
formula and its opponents; `report` keeps and prints; `limits` says what must be reached; `options` and `run` are the
command.
"""
