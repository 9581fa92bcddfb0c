"""The decode forward pass under torch.compile: what a model does between its attention and its linear layers, fused.

    (input_ids, position_ids) [rows, 1] -> the module's output

Two things stay as they are, as operators that the compiler calls and does not look into: attention together with the
write of the new keys and values (`ragged_attention.py`), and the linear layers of a CPU (`cpu_linear.py`). When they
run they find the view, the cache and the weights of the running engine where `CompiledForward` put them. So the
compiled code knows no slab, no length and no run, only the number of rows, which is dynamic: it is compiled once, as
one graph, and serves every run of its engine. A compiler treats a single row as another program, so one row goes
through as two equal ones.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from power_kernels.api import torch_private
from power_kernels.api.driver.engine import UnsupportedModelError
from power_kernels.api.engines.huggingface.cpu_linear import SmallBatchLinear
from power_kernels.api.engines.huggingface.patches import Patches
from power_kernels.api.engines.huggingface.ragged_attention import ragged_attention
from power_kernels.errors import ArgumentError, ArgumentTypeError

NAME = "power_kernels_compiled"

_running = threading.local()  # .call: the _Call whose forward pass is on in this thread
_library = torch.library.Library("power_kernels_engine", "DEF")
_library.define("linear(Tensor x, int index, int out_features) -> Tensor")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, int layer, float scale, int? window, float? softcap, Tensor? sinks)"
    " -> Tensor"
)


class _Call:
    """cache: the run's. rows: those that count. linears: the run's linear layers, by the index of their stub."""

    def __init__(self, module: nn.Module, cache: Cache, rows: int, linears: dict[int, SmallBatchLinear]):
        self.module, self.cache, self.rows, self.linears = module, cache, rows, linears


def _linear(x: torch.Tensor, index: int, out_features: int) -> torch.Tensor:
    return _running.call.linears[index](x)


def _attend(query, key, value, layer: int, scale: float, window: int | None, softcap: float | None, sinks):
    """query, key, value [rows, heads, 1, dim]. Returns [rows, 1, heads, value dim], contiguous."""
    call = _running.call
    keys, values = call.cache.update(key[: call.rows], value[: call.rows], layer)
    out, _ = ragged_attention(
        call.module,
        query[: call.rows],
        keys,
        values,
        None,
        scaling=scale,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
    )
    return out.expand(query.shape[0], -1, -1, -1).contiguous()


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("attend", _attend, "CompositeExplicitAutograd")


@torch.library.register_fake("power_kernels_engine::linear", lib=_library)
def _(x, index, out_features):
    return torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)


@torch.library.register_fake("power_kernels_engine::attend", lib=_library)
def _(query, key, value, layer, scale, window, softcap, sinks):
    rows, heads = query.shape[:2]
    return torch.empty(rows, 1, heads, value.shape[-1], dtype=query.dtype, device=query.device)


def _traced_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **kwargs
):
    """The function registered as "power_kernels_compiled"; what else models pass was looked at by the probe."""
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} passed an attention mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.ops.power_kernels_engine.attend(
        query, key, value, module.layer_idx, scale, sliding_window, softcap, s_aux
    )
    return out, None


AttentionInterface.register(NAME, _traced_attention)


class _Stub:
    """What the compiler sees of a linear layer.

    Compiled code is guarded by the identity of what stands in a module's `forward`, so a module keeps its stub for the
    engine's life: a new one a run, which would hold the run's weights itself, would compile the model anew each time.
    """

    def __init__(self, index: int, out_features: int):
        self.index, self.out_features = index, out_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.power_kernels_engine.linear(x, self.index, self.out_features)


class _PassingLayer(CacheLayerMixin):
    """Hands the new keys and values on to attention, which writes them."""

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return 1, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return 1

    get_max_cache_shape = get_max_length


class CompiledForward:
    """Decode forward passes of one engine.

    configs: what the model's modules read their attention implementation from. layers: of the model. backend: of
    torch.compile, in its default mode; True is torch's default.

    The first call compiles, and raises UnsupportedModelError for a model that does not compile as one graph. Weights
    may change at any time; forward hooks that are added or removed count from the next run on.
    """

    def __init__(self, model: PreTrainedModel, configs: list, *, layers: int, backend: bool | str = True):
        if backend is not True and not isinstance(backend, str):
            raise ArgumentTypeError(f"compile is {backend!r}; it must be True, False or the name of a backend")
        known = torch.compiler.list_backends(exclude_tags=())
        if backend is not True and backend not in known:
            raise ArgumentError(f"compile is {backend!r}; torch.compile knows {', '.join(known)}")
        self._backend = "inductor" if backend is True else backend
        self._cache = Cache(layers=[_PassingLayer() for _ in range(layers)])
        self._decode = self._compiled()
        self._model, self._works = model, False
        self._attention = Patches()
        for config in configs:
            self._attention.add(config, "_attn_implementation_internal", NAME)
        self._hooks: list[tuple] | None = None
        self._stubs: dict[nn.Module, _Stub] = {}
        self._linears: weakref.WeakKeyDictionary[Cache, dict[int, SmallBatchLinear]] = weakref.WeakKeyDictionary()

    def _compiled(self):
        cache = self._cache

        def decode(module, input_ids, position_ids):
            return module(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True)

        own = torch_private.with_own_compile_cache(decode)
        return torch.compile(own, fullgraph=True, backend=self._backend)

    def __call__(self, module: nn.Module, cache: Cache, input_ids: torch.Tensor, position_ids: torch.Tensor):
        """The output of `module` for tokens and positions [rows, 1]. To be called as the module itself would be: in
        inference mode, patched, a view attached."""
        rows = input_ids.shape[0]
        # Copies, so that they are always tensors of inference mode, which compiled code tells from others.
        ids, positions = (x.repeat(2 if rows == 1 else 1, 1) for x in (input_ids, position_ids))
        for x in (ids, positions):
            torch_private.mark_dynamic(x, 0)
        previous = getattr(_running, "call", None)
        _running.call = _Call(module, cache, rows, self._linears_of(cache))
        try:
            with self._attention, self._stubbed(_running.call.linears):
                output = self._decode(module, ids, positions)
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self._works and not torch_private.is_compiler_error(error):
                raise
            raise UnsupportedModelError(
                f"{type(self._model).__name__} cannot be compiled as one graph: {type(error).__name__}: {error}"
            ) from error
        finally:
            _running.call = previous
        self._works = True
        if rows == 1:
            for name in ("last_hidden_state", "logits"):
                if name in output:
                    output[name] = output[name][:1]
        return output

    def _linears_of(self, cache: Cache) -> dict[int, SmallBatchLinear]:
        """Those of the run that has this cache, and no longer than it."""
        if cache not in self._linears:
            self._follow_hooks()
            linears = {}
            for module in self._model.modules():
                linear = vars(module).get("forward")
                if isinstance(linear, SmallBatchLinear):
                    stub = self._stubs.setdefault(module, _Stub(len(self._stubs), module.out_features))
                    linears[stub.index] = linear
            self._linears[cache] = linears
        return self._linears[cache]

    def _follow_hooks(self) -> None:
        """Compile again where the owner has changed the model's hooks, at which compiled code does not look."""
        hooks = [torch_private.hooks_of(module) for module in self._model.modules()]
        if self._hooks is not None and hooks != self._hooks:
            self._decode, self._works = self._compiled(), False
        self._hooks = hooks

    @contextmanager
    def _stubbed(self, linears: dict[int, SmallBatchLinear]) -> Iterator[None]:
        # Straight into the modules' dictionaries: there are hundreds, and a Module's own setattr takes its time.
        places = [(vars(linear.module), self._stubs[linear.module], linear) for linear in linears.values()]
        try:
            for names, stub, _ in places:
                names["forward"] = stub
            yield
        finally:
            for names, _, linear in places:
                names["forward"] = linear
