"""Every bad argument of every operator raises a typed error that names it, its value and what is allowed."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import power_kernels as pk
from power_kernels.api.commands import doctor
from power_kernels.errors import ArgumentError, ArgumentTypeError, BackendError
from power_kernels.ops import dispatch
from power_kernels.ops.checks import LOGIT_DTYPES
from tests.devices import DEVICE, host_only, on_device
from tests.op_helpers import BACKENDS, INF, NAN, serving
from tests.test_ops_contract import (
    LAW,
    accept_arguments,
    accept_outputs,
    advance_constants,
    block_tables,
    branch_arguments,
    branch_outputs,
    branch_tally,
    copy_arguments,
    pool_arguments,
    running_state,
    sample_arguments,
    sample_from_hidden_arguments,
    sample_from_hidden_outputs,
    sample_outputs,
    sampled,
    score_arguments,
    score_from_hidden_arguments,
    score_from_hidden_outputs,
    score_outputs,
    selection_arguments,
    slot_arguments,
    slot_outputs,
)

ROWS, VOCAB = 3, 300
FLOAT, INT, LONG, DOUBLE = torch.float32, torch.int32, torch.int64, torch.float64

# ---- every operator's arguments by name: dtype (or dtypes) and shape, None where any size will do

SAMPLE = {
    "logits": (LOGIT_DTYPES, (None, None)),
    "alpha": (FLOAT, (ROWS,)),
    "beta": (FLOAT, (ROWS,)),
    "seed": (LONG, (1,)),
    "counter": (INT, (ROWS, 4)),
    "exclude": (LONG, (ROWS,)),
}
SCORE = {name: SAMPLE[name] for name in ("logits", "alpha", "beta")} | {"tokens": (LONG, (ROWS,))}
FLOATS = dict.fromkeys(("logp", "logq", "weight", "entropy"), (FLOAT, (ROWS,)))
HEAD = {
    "hidden": (LOGIT_DTYPES, (None, None)),
    "lm_head": (FLOAT, (None, 37)),
    "bias": (FLOAT, (VOCAB,)),
}
ROW_OUTPUTS = {"workspace": (FLOAT, (None,)), **FLOATS, "status": (INT, (ROWS,))}
SLOTS = {
    "field": (LONG, (None, 12)),
    "exponent": (FLOAT, (ROWS + 1, 2)),
    "bound": (DOUBLE, (ROWS + 1, 2)),
    "cumw": (DOUBLE, (ROWS + 1,)),
    "logits": (LOGIT_DTYPES, (None, None)),
    "slot": (LONG, (ROWS,)),
    "position": (LONG, (ROWS,)),
    "live": (torch.bool, (ROWS,)),
    "workspace": (FLOAT, (None,)),
    "token": (LONG, (None,)),
    "values": (FLOAT, (None, 3)),
    "flags": (LONG, (None,)),
}
SLOT_TABLE = ("field", "exponent", "bound", "cumw")
SLOT_OUTPUTS = ("token", "values", "flags")  # of any number of rows from B on, and of any strides
ACCEPT = {
    "weights_cur": (FLOAT, (None, None)),
    "weights_prop": (FLOAT, (ROWS, None)),
    "len_cur": (INT, (ROWS,)),
    "len_prop": (INT, (ROWS,)),
    "log_u": (DOUBLE, (ROWS,)),
}
ACCEPT_OUTPUTS = {"accept": (torch.bool, (ROWS,)), "log_ratio": (DOUBLE, (ROWS,)), "status": (INT, (ROWS,))}
COPY = {
    "dst": (None, (None,) * 5),
    "src": (FLOAT, (2, None, 2, None, 4)),
    "ranges": (INT, (None, 4)),
}
LANES, WIDTH = 4, LAW.max_new_tokens + 1  # 2 chains of 2 lanes
STATE = {
    name: (tensor.dtype, tuple(tensor.shape))
    for name, tensor in zip(pk.ChainState.__dataclass_fields__, running_state().tensors(), strict=True)
}
ADVANCE = {
    "length_term": (DOUBLE, (LAW.max_new_tokens + 2,)),
    "seed": (LONG, (1,)),
    "eos": (LONG, (None,)),
    "sampled_token": (LONG, (LANES,)),
    "sampled_logq": (FLOAT, (LANES,)),
    "sampled_weight": (FLOAT, (LANES,)),
    "sampled_status": (INT, (LANES,)),
    "sampled_entropy": (FLOAT, (LANES,)),
    "stop_next": (torch.int16, (None, None)),
}
TABLES = {
    "block_table": (INT, (None, None)),
    "length": (INT, (4,)),
    "refcount": (INT, (None,)),
    "free_list": (INT, (12,)),
    "free_count": (INT, (1,)),
    "copies": (INT, (4, 4)),
    "status": (INT, (4,)),
}
TABLE_VECTORS = {
    "block_table_fork": {"parent": [-1, 0, 3, -1], "tokens": [0, 7, 4, 0]},
    "block_table_extend": {"tokens": [9, -1, 2, 15]},
    "block_table_commit": {"source": [3, -1, -1, -1]},
    "block_table_rollback": {"tokens": [4, 9, -1, 0]},
}
PARTICLES = {  # 2 groups of 3 rows, in the order of the schema
    "logits": (LOGIT_DTYPES, (None, None)),
    "alpha": (FLOAT, (2,)),
    "log_weight": (DOUBLE, (None, None)),
    "order": (INT, (2, 3)),
    "stop_state": (torch.int16, (2, 3)),
    "reference": (LONG, (2,)),
    "last": (torch.bool, (2,)),
    "closing_bonus": (DOUBLE, (2,)),
    "uniform": (DOUBLE, (2, 2)),
    "eos": (LONG, (None,)),
    "stop_next": (torch.int16, (None, VOCAB)),
}
PARTICLE_OUTPUTS = {
    "workspace": (FLOAT, (None,)),
    "tally": (DOUBLE, (2, 4)),
    "parent": (INT, (2, 3)),
    "token": (LONG, (2, 3)),
    "child_log_weight": (DOUBLE, (2, 3)),
    "logp": (DOUBLE, (2, 3)),
    "child_order": (INT, (2, 3)),
    "candidate": (LONG, (2, 2)),
    "candidate_logp": (DOUBLE, (2,)),
    "log_threshold": (DOUBLE, (2,)),
    "status": (INT, (2, 3)),
}
SELECTION = {"tally": (DOUBLE, (None, 4)), "uniform": (DOUBLE, (ROWS,)), "moved": (torch.bool, (ROWS,))}
SPECIFICATIONS = {
    "sample_tokens": SAMPLE,
    "sample_tokens_out": SAMPLE | ROW_OUTPUTS | {"token": (LONG, (ROWS,))},
    "score_tokens": SCORE,
    "score_tokens_out": SCORE | ROW_OUTPUTS,
    "sample_from_hidden": HEAD | {k: v for k, v in SAMPLE.items() if k != "logits"},
    "sample_from_hidden_out": HEAD
    | SAMPLE
    | {"logits": (FLOAT, (ROWS, VOCAB))}
    | ROW_OUTPUTS
    | {"token": (LONG, (ROWS,))},
    "score_from_hidden": HEAD | {k: v for k, v in SCORE.items() if k != "logits"},
    "score_from_hidden_out": HEAD | {k: v for k, v in SCORE.items() if k != "logits"} | ROW_OUTPUTS,
    "sample_slots_out": SLOTS,
    "branch_particles": PARTICLES | {"tally": PARTICLE_OUTPUTS["tally"]},
    "branch_particles_out": PARTICLES | PARTICLE_OUTPUTS,
    "select_candidate_out": SELECTION,
    "mh_accept": ACCEPT,
    "mh_accept_out": ACCEPT | ACCEPT_OUTPUTS,
    "kv_copy_ranges": COPY,
    "mh_advance": STATE | ADVANCE,
    **{name: TABLES | dict.fromkeys(vectors, (INT, (4,))) for name, vectors in TABLE_VECTORS.items()},
    "kv_copy_blocks": {"pool": (None, (None,) * 5), "copies": (INT, (None, 4))},
}
FIRST = {
    "logits",
    "hidden",
    "weights_cur",
    "dst",
    "field",
    "block_table",
    "pool",
}  # the argument that the others must agree with
# only the inner stride of these is asked for
MATRICES = {"logits", "hidden", "lm_head", "weights_cur", "weights_prop", "dst", "src", "block_table", "pool"}
SCRATCH = ("sample_from_hidden_out", "logits")  # an output: not the first argument, and contiguous


def is_first(name: str, argument: str) -> bool:
    if name == "select_candidate_out":
        return argument == "tally"
    return argument in FIRST and (name, argument) not in (SCRATCH, ("sample_slots_out", "field"))


def is_matrix(name: str, argument: str) -> bool:
    return argument in MATRICES and (name, argument) != SCRATCH


def is_strided(name: str, argument: str) -> bool:
    return name == "sample_slots_out" and argument in SLOT_OUTPUTS


def arguments_of(name: str) -> dict[str, torch.Tensor]:
    """On the device, so that nothing is refused there that the host takes, or the other way round."""
    return {argument: on_device(value) for argument, value in host_arguments_of(name).items()}


def host_arguments_of(name: str) -> dict[str, torch.Tensor]:
    def named(names, values):
        return dict(zip(names, values, strict=True))

    sample = named(("logits", "alpha", "beta", "seed", "counter", "exclude"), sample_arguments(ROWS, VOCAB))
    score = named(("logits", "tokens", "alpha", "beta"), score_arguments(ROWS, VOCAB))
    outputs = ("workspace", "token", *FLOATS, "status")
    match name:
        case "sample_tokens":
            return sample
        case "sample_tokens_out":
            return sample | named(outputs, sample_outputs(ROWS, VOCAB))
        case "score_tokens":
            return score
        case "score_tokens_out":
            return score | named(ROW_OUTPUTS, score_outputs(ROWS, VOCAB))
        case "sample_from_hidden" | "sample_from_hidden_out":
            *values, _, _ = sample_from_hidden_arguments(ROWS, VOCAB)
            head = named([*HEAD, *(argument for argument in sample if argument != "logits")], values)
            if name == "sample_from_hidden":
                return head
            return head | named(("logits", *outputs), sample_from_hidden_outputs(ROWS, VOCAB))
        case "score_from_hidden" | "score_from_hidden_out":
            *values, _, _ = score_from_hidden_arguments(ROWS, VOCAB)
            head = named((*HEAD, "tokens", "alpha", "beta"), values)
            if name == "score_from_hidden":
                return head
            return head | named(ROW_OUTPUTS, score_from_hidden_outputs(ROWS, VOCAB))
        case "sample_slots_out":
            return named(SLOTS, (*slot_arguments(ROWS, VOCAB), *slot_outputs(ROWS, VOCAB)))
        case "branch_particles" | "branch_particles_out":
            *values, _, _ = branch_arguments(vocab=VOCAB)
            inputs = named(PARTICLES, values)
            if name == "branch_particles":
                return inputs | {"tally": branch_tally()}
            return inputs | named(PARTICLE_OUTPUTS, branch_outputs(vocab=VOCAB))
        case "select_candidate_out":
            return named(SELECTION, (*selection_arguments(ROWS), torch.zeros(ROWS, dtype=torch.bool)))
        case "mh_accept":
            return named(ACCEPT, accept_arguments(ROWS))
        case "mh_accept_out":
            return named(ACCEPT, accept_arguments(ROWS)) | named(ACCEPT_OUTPUTS, accept_outputs(ROWS))
        case "kv_copy_ranges":
            return named(COPY, copy_arguments())
        case "kv_copy_blocks":
            return named(("pool", "copies"), pool_arguments())
        case _ if name in TABLE_VECTORS:
            vectors = {k: torch.tensor(v, dtype=torch.int32) for k, v in TABLE_VECTORS[name].items()}
            return {argument: getattr(block_tables(), argument) for argument in TABLES} | vectors
        case "mh_advance":
            state = running_state()
            return named(STATE | ADVANCE, (*state.tensors(), *advance_constants(), *sampled(state)))


def call(name: str, arguments: dict) -> object:
    if name.endswith("_from_hidden_out"):
        return getattr(pk, name)(**{"softcap": 20.0, "scale": 0.75, **arguments})
    if name == "branch_particles_out":
        return pk.branch_particles_out(**{"length_bonus": 0.25, "rho": 0.1, **arguments})
    if name == "mh_advance":
        state = pk.ChainState(**{k: v for k, v in arguments.items() if k in STATE})
        return pk.mh_advance(state, LAW, **{k: v for k, v in arguments.items() if k not in STATE})
    if name == "sample_slots_out":
        table = pk.SlotTable(**{k: arguments[k] for k in SLOT_TABLE})
        return pk.sample_slots_out(table, **{k: v for k, v in arguments.items() if k not in SLOT_TABLE})
    if name in TABLE_VECTORS:
        tables = pk.BlockTables(**{k: arguments[k] for k in TABLES}, block_size=block_tables().block_size)
        return getattr(pk, name)(tables, **{k: arguments[k] for k in TABLE_VECTORS[name]})
    return getattr(pk, name)(**arguments)


def assert_refused(name: str, changes: dict, error: type, *fragments: str) -> None:
    """The call raises exactly `error`, says each fragment (a regular expression), and has written nothing."""
    arguments = arguments_of(name)
    arguments.update({argument: on_device(value) for argument, value in changes.items()})
    kept = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    with pytest.raises(error) as caught:
        call(name, arguments)
    assert type(caught.value) is error
    for fragment in fragments:
        assert re.search(fragment, str(caught.value)), f"{fragment!r} is not in {str(caught.value)!r}"
    for argument, before in kept.items():
        assert torch.equal(before.nan_to_num(), arguments[argument].nan_to_num()), argument


def cases(keep=lambda name, argument: True):
    found = [(n, a) for n, specification in SPECIFICATIONS.items() for a in specification if keep(n, a)]
    return pytest.mark.parametrize(("name", "argument"), found)


def dtype_of(name: str, argument: str) -> torch.dtype:
    return arguments_of(name)[argument].dtype


def test_the_tables_name_every_argument():
    for name in SPECIFICATIONS:
        assert set(SPECIFICATIONS[name]) == set(arguments_of(name))
        call(name, arguments_of(name))  # and the unchanged call is accepted
    assert set(dispatch.SCHEMAS) == set(SPECIFICATIONS)


# ---- Python types, dtypes, devices, layouts


@cases()
def test_what_is_not_a_tensor_is_refused_by_name_and_type(name, argument):
    tensor = arguments_of(name)[argument]
    for value in (tensor.tolist(), 4.0, "text", tensor.cpu().numpy()):
        fragments = (rf"\b{argument}\b", type(value).__name__, r"torch\.Tensor")
        assert_refused(name, {argument: value}, ArgumentTypeError, *fragments)
    if argument not in ("exclude", "entropy", "bias", "stop_state", "stop_next"):  # those that may be left out
        assert_refused(name, {argument: None}, ArgumentTypeError, rf"\b{argument}\b", "NoneType", r"torch\.Tensor")


@cases(lambda name, argument: SPECIFICATIONS[name][argument][0] is not None)
def test_a_wrong_dtype_is_refused_with_those_allowed(name, argument):
    allowed = SPECIFICATIONS[name][argument][0]
    allowed = allowed if isinstance(allowed, tuple) else (allowed,)
    tensor = arguments_of(name)[argument]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool):
        if dtype not in allowed:
            fragments = (rf"\b{argument}\b", re.escape(str(dtype)) + r"\b", *(re.escape(str(a)) for a in allowed))
            assert_refused(name, {argument: tensor.to(dtype)}, ArgumentTypeError, *fragments)


@cases()
def test_a_tensor_on_another_device_is_refused_with_both_devices(name, argument):
    changed = {argument: arguments_of(name)[argument].to("meta")}
    blamed = rf"^{argument} is on meta; .* on {DEVICE}"
    if is_first(name, argument):
        blamed = rf"^\w+ is on {DEVICE}; it must be on meta"
    assert_refused(name, changed, ArgumentTypeError, blamed)


@cases()
def test_a_sparse_tensor_is_refused(name, argument):
    tensor = arguments_of(name)[argument]
    changed = {argument: tensor.to_sparse()}
    fragments = (rf"\b{argument}\b", r"torch\.sparse_coo", r"torch\.strided")
    with pytest.raises(ArgumentTypeError) as caught:
        call(name, arguments_of(name) | changed)
    assert all(re.search(f, str(caught.value)) for f in fragments), str(caught.value)


# ---- shapes and strides


@cases()
def test_a_wrong_number_of_dimensions_is_refused_with_the_shape_wanted(name, argument):
    tensor = arguments_of(name)[argument]
    for value in (tensor.unsqueeze(0), tensor[0].clone(), tensor.flatten()[0].clone()):
        fragments = (rf"^{argument}\b", re.escape(str(list(value.shape))), r"must be \[")
        assert_refused(name, {argument: value}, ArgumentError, *fragments)


FIXED = [
    (name, argument, i)
    for name, specification in SPECIFICATIONS.items()
    for argument, (_, shape) in specification.items()
    for i, size in enumerate(shape)
    if size is not None and not (argument == "field" and i == 0)
]


@pytest.mark.parametrize(("name", "argument", "dimension"), FIXED)
def test_a_size_that_does_not_match_is_refused_with_the_shape_wanted(name, argument, dimension):
    tensor = arguments_of(name)[argument]
    # A seed may also have a row for each of the two or three there are.
    longer = 4 if argument == "seed" else tensor.shape[dimension] + 1
    for size in (tensor.shape[dimension] - 1, longer):
        index = torch.arange(size, device=tensor.device) % tensor.shape[dimension]
        value = tensor.index_select(dimension, index)
        fragments = (re.escape(str(list(value.shape))), rf"must be \[.*{tensor.shape[dimension]}.*\]")
        if name == "mh_advance" and argument == "lane_field" and dimension == 0:
            fragments = (r"^state has [35] lanes for 2 chains",)  # it is what tells the number of lanes
        else:
            fragments = (rf"^{argument}\b", *fragments)
        assert_refused(name, {argument: value}, ArgumentError, *fragments)


@cases(lambda name, argument: not is_matrix(name, argument) and not is_strided(name, argument))
def test_a_vector_with_gaps_is_refused_with_its_strides(name, argument):
    tensor = arguments_of(name)[argument]
    if tensor.numel() < 2:
        return
    value = tensor.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(value.nan_to_num(), tensor.nan_to_num())
    fragments = (rf"^{argument}\b", re.escape(str(list(value.stride()))), "contiguous")
    assert_refused(name, {argument: value}, ArgumentError, *fragments)


@cases(is_matrix)
def test_an_inner_stride_that_is_not_one_is_refused_with_its_value(name, argument):
    tensor = arguments_of(name)[argument]
    for value, stride in (
        (tensor.repeat_interleave(2, -1)[..., ::2], 2),
        (tensor.transpose(-1, -2).contiguous().transpose(-1, -2), tensor.shape[-2]),
        (tensor[..., :1].expand(tensor.shape), 0),
    ):
        fragments = (rf"^{argument}\b", rf"inner stride {stride}\b", "must be 1")
        assert_refused(name, {argument: value}, ArgumentError, *fragments)


# ---- values


@pytest.mark.parametrize("name", ["sample_tokens", "sample_tokens_out", "score_tokens", "score_tokens_out"])
def test_an_empty_vocabulary_is_refused(name):
    changed = {"logits": torch.empty(ROWS, 0)}
    assert_refused(name, changed, ArgumentError, "^logits", r"empty vocabulary|\[3, 0\]", "at least 1")


@host_only  # elsewhere nobody looks at values: test_cuda.py
@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, -0.0, -1.0, -1e-45])
@pytest.mark.parametrize("argument", ["alpha", "beta"])
@pytest.mark.parametrize("name", ["sample_tokens", "sample_tokens_out", "score_tokens", "score_tokens_out"])
def test_exponents_that_are_not_finite_and_positive_are_refused_by_row(name, argument, value):
    exponents = torch.full((ROWS,), 4.0)
    exponents[1:] = value
    shown = re.escape(str(exponents[1].item()))
    fragments = (rf"^{argument}\[1\] is {shown}\b", "finite and positive")
    assert_refused(name, {argument: exponents}, ArgumentError, *fragments)


@pytest.mark.parametrize("name", ["sample_tokens_out", "score_tokens_out", "sample_slots_out"])
def test_a_workspace_that_is_too_small_is_refused_with_the_size_needed(name):
    need = pk.workspace_size(ROWS, VOCAB)
    for size in (need - 1, 0):
        fragments = (rf"^workspace has {size} elements", rf"at least {need}\b")
        assert_refused(name, {"workspace": torch.empty(size)}, ArgumentError, *fragments)


def test_a_workspace_of_particles_that_is_too_small_is_refused_with_the_size_needed():
    need = pk.branch_workspace_size(6, VOCAB)
    fragments = (rf"^workspace has {need - 1} elements", rf"at least {need}\b")
    assert_refused("branch_particles_out", {"workspace": torch.empty(need - 1)}, ArgumentError, *fragments)


@pytest.mark.parametrize("rows", [2, 130])
def test_a_group_of_too_few_or_too_many_rows_is_refused(rows):
    changed = {"log_weight": torch.zeros(2, rows, dtype=DOUBLE)}
    assert_refused("branch_particles", changed, ArgumentError, f"^log_weight has {rows} rows", r"N in \[2, 128\]")


def test_logits_must_have_the_rows_of_all_groups():
    changed = {"logits": torch.zeros(7, VOCAB)}
    assert_refused("branch_particles", changed, ArgumentError, "^logits has 7 rows", r"2 \* 3")


@pytest.mark.parametrize(("missing", "given"), [("stop_state", "stop_next"), ("stop_next", "stop_state")])
def test_half_a_stop_automaton_is_refused(missing, given):
    fragments = (f"^{missing} is None and {given} is not", "both or neither")
    assert_refused("branch_particles", {missing: None}, ArgumentError, *fragments)


@pytest.mark.parametrize(("value", "error"), [(-0.1, ArgumentError), (1.5, ArgumentError), ("much", ArgumentTypeError)])
def test_rho_outside_its_range_is_refused(value, error):
    assert_refused("branch_particles", {"rho": value}, error, f"^rho is '?{value}")


@pytest.mark.parametrize(("value", "error"), [(NAN, ArgumentError), (2e6, ArgumentError), (None, ArgumentTypeError)])
def test_a_length_bonus_outside_its_range_is_refused(value, error):
    assert_refused("branch_particles", {"length_bonus": value}, error, "^length_bonus is")


@host_only  # elsewhere nobody looks at values
@pytest.mark.parametrize(
    ("argument", "value", "fragments"),
    [
        ("order", torch.tensor([[0, 1, 2], [0, 1, 1]], dtype=INT), ("each of 3 rows once",)),
        ("uniform", torch.tensor([[0.1, 1.0], [0.1, 0.2]], dtype=DOUBLE), (r"entry 1\.0", r"\[0, 1\)")),
        ("uniform", torch.tensor([[0.1, NAN], [0.1, 0.2]], dtype=DOUBLE), ("entry nan", r"\[0, 1\)")),
        ("stop_state", torch.tensor([[0, 1, 2], [0, 5, 1]], dtype=torch.int16), ("entry 5", r"\[0, 5\)")),
        ("stop_state", torch.tensor([[0, 1, 2], [0, -1, 1]], dtype=torch.int16), ("entry -1", r"\[0, 5\)")),
        ("closing_bonus", torch.tensor([0.0, INF], dtype=DOUBLE), ("inf", "finite")),
        ("alpha", torch.tensor([1.0, -1.0]), (r"\[1\] is -1\.0", "finite and positive")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_of_particles_that_cannot_be_are_refused(argument, value, fragments):
    assert_refused("branch_particles", {argument: value}, ArgumentError, rf"^{argument}\b", *fragments)


@pytest.mark.parametrize("argument", SLOT_OUTPUTS)
def test_outputs_by_slot_that_are_too_short_or_lie_on_themselves_are_refused(argument):
    whole = arguments_of("sample_slots_out")[argument]
    fragments = (rf"^{argument} has {ROWS - 1} rows", rf"at least {ROWS}\b")
    assert_refused("sample_slots_out", {argument: whole[:-1]}, ArgumentError, *fragments)
    fragments = (rf"^{argument} has strides \[0\b", "share memory")
    assert_refused("sample_slots_out", {argument: whole[:1].expand(whole.shape)}, ArgumentError, *fragments)


def test_a_table_must_be_a_slot_table():
    arguments = arguments_of("sample_slots_out")
    rest = [arguments[k] for k in ("logits", "slot", "position", "live")]
    for table in (None, tuple(arguments[k] for k in SLOT_TABLE)):
        with pytest.raises(ArgumentTypeError, match=rf"^table is a {type(table).__name__}; it must be a SlotTable"):
            pk.sample_slots(table, *rest)


@pytest.mark.parametrize("value", ["yes", None, 1, 0.0, torch.tensor(True)], ids=str)
def test_entropy_by_slot_must_be_a_bool(value):
    fragments = ("^entropy", type(value).__name__, "bool")
    assert_refused("sample_slots_out", {"entropy": value}, ArgumentTypeError, *fragments)


@pytest.mark.parametrize("value", ["yes", None, 1, 0.0, torch.tensor(True)], ids=str)
@pytest.mark.parametrize("name", ["sample_tokens", "score_tokens"])
def test_return_entropy_must_be_a_bool(name, value):
    fragments = ("^return_entropy", type(value).__name__, "bool")
    assert_refused(name, {"return_entropy": value}, ArgumentTypeError, *fragments)


# dst has 3 rows and 5 positions, src has 5 rows
OUTSIDE = [
    [-1, 0, 0, 1],
    [3, 0, 0, 1],
    [0, -1, 0, 1],
    [0, 5, 0, 1],
    [0, 0, -1, 1],
    [0, 0, 0, 6],
    [0, 0, 5, 6],
    [0, 0, -(2**31), 2**31 - 1],
    [2**31 - 1, 0, 0, 1],
    [-(2**31), 0, 0, 1],
]


@host_only  # elsewhere nobody looks at values: test_cuda.py
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", OUTSIDE)
def test_a_range_outside_the_slabs_is_refused_before_anything_is_copied(backend, bad):
    ranges = torch.tensor([[0, 0, 0, 5], bad], dtype=torch.int32)
    fragments = (r"^ranges\[1\] is " + re.escape(str(bad)), r"\[0, 3\)", r"\[0, 5\)", r"positions in \[0, 5\]")
    with serving(backend):
        assert_refused("kv_copy_ranges", {"ranges": ranges}, ArgumentError, *fragments)


def test_positions_are_limited_by_the_shorter_slab():
    for dst_positions, src_positions in ((5, 7), (7, 5)):
        dst, src = torch.zeros(2, 3, 2, dst_positions, 4), torch.zeros(2, 3, 2, src_positions, 4)
        with pytest.raises(ArgumentError, match=re.escape("positions in [0, 5]")):
            pk.kv_copy_ranges(dst, src, torch.tensor([[0, 0, 0, 6]], dtype=torch.int32))


def test_slabs_of_different_dtypes_are_refused_with_both():
    changed = {"dst": torch.zeros(2, 3, 2, 5, 4, dtype=torch.float16)}
    assert_refused("kv_copy_ranges", changed, ArgumentTypeError, "^src", "float32", "allowed: torch.float16")


@pytest.mark.parametrize("dimension", [0, 2, 4])
def test_slabs_that_differ_in_layers_heads_or_width_are_refused(dimension):
    shape = [2, 3, 2, 5, 4]
    shape[dimension] += 1
    fragments = ("^src", re.escape(str([2, 5, 2, 5, 4])), rf"must be \[.*{shape[dimension]}.*\]")
    assert_refused("kv_copy_ranges", {"dst": torch.zeros(shape)}, ArgumentError, *fragments)


# ---- mh_advance as a whole


def test_a_state_without_chains_is_refused():
    state = running_state().first(0)
    with pytest.raises(ArgumentError, match="state has 0 lanes for 0 chains"):
        pk.mh_advance(state, LAW, *advance_constants(), *sampled(state))


def test_a_state_of_another_law_is_refused_by_its_first_tensor_that_differs():
    state = running_state()
    longer = pk.Law(**{**vars(LAW), "max_new_tokens": LAW.max_new_tokens + 1})
    with pytest.raises(ArgumentError, match=r"^token has shape \[2, 7\]; it must be \[2, 8\]"):
        pk.mh_advance(state, longer, *advance_constants(), *sampled(state))
    more_steps = pk.Law(**{**vars(LAW), "mcmc_steps": LAW.mcmc_steps + 1})
    with pytest.raises(ArgumentError, match=r"^outcome has shape"):
        pk.mh_advance(state, more_steps, *advance_constants(), *sampled(state))


@pytest.mark.parametrize("value", [None, (), torch.zeros(2, 16), {"field": 1}])
def test_a_state_or_law_of_another_type_is_refused(value):
    state = running_state()
    rest = (*advance_constants(), *sampled(state))
    kind = type(value).__name__
    with pytest.raises(ArgumentTypeError, match=f"^state is a {kind}; it must be a ChainState"):
        pk.mh_advance(value, LAW, *rest)
    with pytest.raises(ArgumentTypeError, match=f"^law is a {kind}; it must be a Law"):
        pk.mh_advance(state, value, *rest)


# ---- the law and the state


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_new_tokens", 0, "[1, 2147483647]"),
        ("max_new_tokens", 2**31, "[1, 2147483647]"),
        ("block_size", 0, "[1, 2147483647]"),
        ("block_size", -1, "[1, 2147483647]"),
        ("mcmc_steps", -1, "[0, 2147483647]"),
        ("final_steps", -3, "[0, 2147483647]"),
    ],
)
def test_a_law_out_of_range_is_refused_with_the_field(name, value, allowed):
    with pytest.raises(ArgumentError, match=re.escape(f"{name} is {value}; it must lie in {allowed}")):
        pk.Law(**{**vars(LAW), name: value})


@pytest.mark.parametrize("name", pk.Law.__dataclass_fields__)
@pytest.mark.parametrize("value", [None, 1.0, "1", True, 1])
def test_a_law_of_other_types_is_refused_with_the_field(name, value):
    law, given = pk.Law(6, 3, 2, early_rejection=False), pk.Law.__dataclass_fields__[name].type
    if type(value).__name__ in (given, {"float": "int"}.get(given)) and given != "str":
        replace(law, **{name: value})
    elif type(value).__name__ == given:
        with pytest.raises(ArgumentError, match=f"^{name} is {value!r}; allowed: 'uniform', 'divergence', "):
            replace(law, **{name: value})
    else:
        kind = {"bool": "a bool", "int": "an int", "str": "a str", "float": "a float"}[given]
        with pytest.raises(ArgumentTypeError, match=re.escape(f"{name} is {value!r}, a ") + f".*it must be {kind}"):
            replace(law, **{name: value})


@pytest.mark.parametrize("cut", ["divergence", "divergence-entropy"])
def test_the_published_code_with_another_cut_is_refused(cut):
    with pytest.raises(ArgumentError, match=f"^cut is '{cut}' with karan_du"):
        pk.Law(6, 3, 2, early_rejection=False, karan_du=True, cut=cut)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_length_bonus_that_is_not_finite_is_refused(value):
    with pytest.raises(ArgumentError, match=f"^length_bonus is {value}; it must lie in "):
        replace(LAW, length_bonus=value)


def test_the_published_code_with_a_length_bonus_is_refused():
    with pytest.raises(ArgumentError, match=r"^length_bonus is 0.5 with karan_du"):
        pk.Law(6, 3, 2, early_rejection=False, karan_du=True, length_bonus=0.5)


def test_the_published_code_with_early_rejection_is_refused():
    with pytest.raises(ArgumentError, match=r"^early_rejection is True with karan_du, .* must be False there"):
        pk.Law(6, 3, 2, karan_du=True)


def test_a_state_of_another_cut_law_is_refused():
    uniform = replace(LAW, cut="uniform")
    with pytest.raises(ArgumentError, match=r"^cumz has shape \[2, 7\]; it must be \[2, 0\]"):
        pk.mh_advance(running_state(), uniform, *advance_constants(), *sampled(running_state()))
    state = pk.ChainState.allocate(2, 2, uniform)
    with pytest.raises(ArgumentError, match=r"^cumz has shape \[2, 0\]; it must be \[2, 7\]"):
        pk.mh_advance(state, LAW, *advance_constants(), *sampled(state))


@pytest.mark.parametrize("cut", pk.CUTS)
def test_entropies_may_be_left_out_where_the_cut_law_does_not_read_them(cut):
    law = replace(LAW, cut=cut)
    state = pk.ChainState.allocate(2, 2, law)
    *without, _, stop_next = sampled(state, pk.Status.PENDING)
    if cut == "divergence-entropy":
        with pytest.raises(ArgumentTypeError, match=r"^sampled_entropy is a NoneType.*the cut law"):
            pk.mh_advance(state, law, *advance_constants(), *without, stop_next=stop_next)
    else:
        pk.mh_advance(state, law, *advance_constants(), *without, stop_next=stop_next)


def test_a_table_of_stop_strings_is_wanted_by_a_law_with_them_and_by_no_other():
    state = running_state()
    *drawn, stop_next = sampled(state)
    with pytest.raises(ArgumentTypeError, match=r"^stop_next is a NoneType; .* a law with stops"):
        pk.mh_advance(state, LAW, *advance_constants(), *drawn)
    for bad, message in (
        (stop_next[:0], "stop_next has 0 rows; it must have 1 to 32768"),
        (stop_next.new_zeros(2**15 + 1, 1), "stop_next has 32769 rows; it must have 1 to 32768"),
        (stop_next[:, :0], "stop_next has no columns"),
    ):
        with pytest.raises(ArgumentError, match=f"^{message}"):
            pk.mh_advance(state, LAW, *advance_constants(), *drawn, bad)
    without = replace(LAW, stops=False)
    state = pk.ChainState.allocate(2, 2, without)
    with pytest.raises(ArgumentError, match=r"^stop_next is given for a law without stops"):
        pk.mh_advance(state, without, *advance_constants(), *drawn, stop_next)


@pytest.mark.parametrize("name", [*STATE, "length_term", "seed", "eos", "stop_next"])
def test_what_is_put_in_place_of_a_checked_tensor_is_checked_again(name):
    """A state that was advanced is not looked at again, until one of its tensors is another."""
    arguments = arguments_of("mh_advance")
    state = pk.ChainState(**{k: v for k, v in arguments.items() if k in STATE})
    rest = {k: v for k, v in arguments.items() if k not in STATE}
    pk.mh_advance(state, LAW, **rest)
    good = arguments[name]
    for bad, error in ((good.to(torch.float16), ArgumentTypeError), (good[None], ArgumentError)):
        with pytest.raises(error, match=rf"^{name} has "):
            advance_with(state, name, bad, rest)
    advance_with(state, name, good.clone(), rest)


def advance_with(state: pk.ChainState, name: str, value: torch.Tensor, rest: dict) -> None:
    if name in STATE:
        setattr(state, name, value)
        pk.mh_advance(state, LAW, **rest)
    else:
        pk.mh_advance(state, LAW, **{**rest, name: value})


def test_a_state_that_was_checked_for_one_law_is_checked_again_for_another():
    state = running_state()
    pk.mh_advance(state, LAW, *advance_constants(), *sampled(state))
    with pytest.raises(ArgumentError, match=r"^outcome has shape"):
        pk.mh_advance(state, replace(LAW, mcmc_steps=LAW.mcmc_steps + 1), *advance_constants(), *sampled(state))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1, LAW), ArgumentError, "chains is 0"),
        ((1, 0, LAW), ArgumentError, "lanes is 0"),
        ((1, -2, LAW), ArgumentError, "lanes is -2"),
        ((1.0, 1, LAW), ArgumentTypeError, "chains is 1.0, a float"),
        ((1, True, LAW), ArgumentTypeError, "lanes is True, a bool"),
        ((1, 1, (6, 3, 2)), ArgumentTypeError, "law is a tuple; it must be a Law"),
    ],
)
def test_a_state_of_no_chains_no_lanes_or_no_law_is_not_allocated(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pk.ChainState.allocate(*arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(chain=2), ArgumentError, "chain is 2; it must lie in [0, 1]"),
        (dict(chain=-1), ArgumentError, "chain is -1"),
        (dict(chain=None), ArgumentTypeError, "chain is None"),
        (dict(prompt=[]), ArgumentError, "prompt is empty"),
        (dict(prompt=[3, -1]), ArgumentError, "prompt[-1] is -1"),
        (dict(prompt=[3, 2**31]), ArgumentError, "prompt[-1] is 2147483648"),
        (dict(prompt="ab"), ArgumentTypeError, "prompt[-1] is 'b', a str"),
        (dict(chain_id=-1), ArgumentError, "chain_id is -1"),
        (dict(chain_id=2**31), ArgumentError, "chain_id is 2147483648; it must lie in [0, 2147483647]"),
        (dict(prompt_id=2**29), ArgumentError, "prompt_id is 536870912; it must lie in [0, 536870911]"),
        (dict(prompt_id=0.5), ArgumentTypeError, "prompt_id is 0.5, a float"),
    ],
)
def test_a_chain_that_cannot_run_is_not_admitted(changed, error, message):
    state = pk.ChainState.allocate(2, 2, LAW)
    with pytest.raises(error, match=re.escape(message)):
        state.admit(**{**dict(chain=1, prompt=[5, 6], chain_id=0, prompt_id=0), **changed})
    assert not any(tensor.any() for tensor in state.tensors()), "a refused chain left something behind"
    state.admit(1, [5, 2**31 - 1], chain_id=2**31 - 1, prompt_id=2**29 - 1)


# ---- the errors themselves, and backends that cannot run


def test_argument_errors_are_value_and_type_errors():
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentTypeError, ArgumentError)
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(BackendError, RuntimeError)


@pytest.mark.parametrize("name", ["cuda", "", "CPP", None, 3])
def test_an_unknown_backend_is_refused_with_those_that_exist(name):
    with pytest.raises(ArgumentError) as caught, pk.use_backend(name):
        pass
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in dispatch.BACKENDS)


def test_a_backend_that_was_not_built_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "EXTENSION_MISSING", "no compiler was found")
    with pytest.raises(BackendError, match="'cpp' cannot run: no compiler was found"), pk.use_backend("cpp"):
        pass
    dispatch._family.cache_clear()
    monkeypatch.setitem(sys.modules, "power_kernels.triton.sampling", None)
    with pytest.raises(BackendError, match="triton"), pk.use_backend("triton"):
        pass


def everything_an_extension_must_name() -> bytes:
    return b"".join(text.encode() + b"\0" for text in (dispatch.state_layout(), dispatch.REGISTER, *dispatch.KERNELS))


def extension() -> Path:
    if dispatch.EXTENSION_MISSING:
        pytest.skip(dispatch.EXTENSION_MISSING)
    return next(dispatch.PACKAGE.glob("_C*.so"))


@host_only
def test_an_extension_built_from_other_sources_is_left_alone_and_the_doctor_says_so(tmp_path):
    """A process whose package is a copy with one column of the state elsewhere in its C++."""
    built, package = extension(), tmp_path / "power_kernels"
    ignored = shutil.ignore_patterns("__pycache__", "_C*", "api")
    shutil.copytree(built.parent, package, ignore=ignored)
    shutil.copytree(Path(doctor.__file__).parents[1], package / "api", ignore=ignored)
    (package / built.name).write_bytes(built.read_bytes().replace(b",LENGTH=1,", b",LENGTH=9,"))
    code = "import power_kernels as pk; print(pk.__file__); from power_kernels.api.commands.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code, "doctor"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(package)), run.stdout
    assert f"{built.name} was built from other sources than this package; build it again" in run.stdout
    assert "cpp" not in run.stdout, "something is served by kernels that write other columns"


def test_an_extension_is_not_loaded_before_its_layout_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda path: pytest.fail(f"{path} was loaded"))
    monkeypatch.setattr(dispatch, "PACKAGE", tmp_path)
    assert "was not built" in dispatch._load_extension()
    whole = everything_an_extension_must_name()
    lacking = whole.replace(b"mh_advance\0", b"")
    for contents in (b"", lacking, whole.replace(b"pitch=", b"pitch=1"), whole.replace(b"Mode:", b"Mode:X=9,")):
        (tmp_path / "_C.abi3.so").write_bytes(contents)
        assert "_C.abi3.so was built from other sources" in dispatch._load_extension()


def test_a_file_that_is_no_extension_is_reported_with_the_loaders_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "PACKAGE", tmp_path)
    (tmp_path / "_C.abi3.so").write_bytes(everything_an_extension_must_name())
    assert re.match(
        rf"_C.abi3.so does not load with torch {re.escape(torch.__version__)}: .+", dispatch._load_extension()
    )


@host_only
def test_triton_on_cpu_tensors_outside_its_interpreter_is_refused(monkeypatch):
    with serving("triton"):
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(BackendError, match=r"triton.*CPU.*TRITON_INTERPRET=1"):
            pk.mh_accept(*accept_arguments())


@host_only
def test_cpp_on_tensors_of_another_device_is_refused():
    with serving("cpp"), pytest.raises(BackendError, match=r"'cpp'.*CPU.*meta"):
        pk.kv_copy_ranges(*(a.to("meta") for a in copy_arguments()))


def test_numbers_from_numpy_are_no_tensors():
    with pytest.raises(ArgumentTypeError, match=r"^log_u is a ndarray; it must be a torch\.Tensor"):
        pk.mh_accept(*accept_arguments()[:4], np.zeros(ROWS))
