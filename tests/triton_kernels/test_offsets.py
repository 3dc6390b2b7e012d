"""Offsets past 2**31, without the memory: where the outer programs of a huge launch read and write.

Launchers run on meta tensors. Of each launch the interpreter runs the first program and the last,
on pointers to nothing, with loads and stores that only note their addresses. The tables of
multi_tensor are real, and what they list is not there.
"""

import numpy as np
import pytest
import torch

from torchref.triton_kernels import (
    _launch,
    activation,
    batch_norm,
    bias_act_dropout,
    cross_entropy,
    dropout,
    linear_cross_entropy,
    loss,
    multi_tensor,
    softmax,
)
from torchref.triton_kernels._tables import Tables

pytestmark = pytest.mark.skipif(not _launch.INTERPRETED, reason="looks into the interpreter")

FIRST = 2**50  # the address of a tensor that is not there; the next one's is twice that


class Nowhere(torch.Tensor):
    """Stands for the memory of a meta tensor."""

    address: int

    def data_ptr(self):
        return self.address


def placed(x: torch.Tensor, address: int) -> Nowhere:
    nowhere = torch.empty(1, dtype=x.dtype).as_subclass(Nowhere)
    nowhere.address = address
    return nowhere


class OuterPrograms:
    """Runs them, and keeps for each tensor the first and the last element that they touched."""

    def __init__(self, monkeypatch):
        from triton.runtime import interpreter

        self.interpreter = interpreter
        self.touched: list[tuple[str, torch.Tensor, int, int]] = []
        monkeypatch.setattr(_launch, "_run", self.run)
        monkeypatch.setattr(_launch, "multiprocessors", lambda x: 1)
        # so many that a part is of four tiles, however many rows there are
        monkeypatch.setattr(bias_act_dropout, "multiprocessors", lambda x: 2**24)
        monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, a, k: (a, k))
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda self, *_: None)
        builder = interpreter.InterpreterBuilder
        self.real_load, self.listed = builder.create_masked_load, {}
        monkeypatch.setattr(builder, "create_masked_load", self.load)
        monkeypatch.setattr(builder, "create_masked_store", self.store)
        self.monkeypatch = monkeypatch

    def run(self, kernel, programs, args, num_warps, constexprs):
        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.is_meta]
        addresses = {id(x): FIRST << number for number, x in enumerate(tensors)}
        args = [placed(x, addresses[id(x)]) if id(x) in addresses else x for x in args]
        addresses |= {id(x): address for address, x in self.listed.items()}
        tensors += self.listed.values()
        self.offsets = {address: (np.inf, -np.inf) for address in addresses.values()}
        builder = self.interpreter.interpreter_builder
        set_size, set_index = builder.set_grid_dim, builder.set_grid_idx
        for program in (0, programs - 1):
            with self.monkeypatch.context() as patch:
                patch.setattr(builder, "set_grid_dim", lambda *_: set_size(programs, 1, 1))
                patch.setattr(
                    builder, "set_grid_idx", lambda *_, program=program: set_index(program, 0, 0)
                )
                _launch._interpret(kernel, 1, args, constexprs)
        for x in tensors:
            low, high = self.offsets[addresses[id(x)]]
            if high >= 0:
                self.touched.append((kernel.fn.__name__, x, low, high))

    def note(self, pointers, mask):
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.int64)
        for base, (low, high) in self.offsets.items():
            here = addresses[(addresses >= base // 4 * 3) & (addresses < base // 2 * 3)]
            if here.size:
                size = pointers.get_element_ty().primitive_bitwidth // 8
                offsets = (here - base) // size
                self.offsets[base] = min(low, offsets.min()), max(high, offsets.max())

    def tables(self, n: int, columns: int) -> Tables:
        """Of one tensor, that has n elements in each column, or one where a count is."""
        one = [multi_tensor.LR.value, multi_tensor.STEP.value, multi_tensor.EMA_STEP.value]
        skipped = multi_tensor.GRAD.value
        tables = Tables([n], torch.device("cpu"), [torch.float32] * columns)
        for i in range(columns):
            x = torch.empty(1 if i + skipped in one else n, device="meta")
            self.listed[FIRST << i] = x
        tables.load([[address] for address in self.listed], numbers=[(0.5,) * 13])
        return tables

    def load(self, pointers, mask, *rest):
        if pointers.data.flat[0] < FIRST and len(self.listed):
            return self.real_load(self.interpreter.interpreter_builder, pointers, mask, *rest)
        self.note(pointers, mask)
        kind = pointers.get_element_ty()
        zeros = np.zeros(pointers.data.shape, self.interpreter._get_np_dtype(kind))
        return self.interpreter.TensorHandle(zeros, kind)

    def store(self, pointers, value, mask, *_):
        self.note(pointers, mask)


@pytest.fixture
def outer_programs(monkeypatch):
    return OuterPrograms(monkeypatch)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, **kwargs) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(**kwargs)


FLAT, TALL, WIDE, DEEP = meta(2**33 + 5), meta(2**31 + 7, 3), meta(3, 2**30 + 8), meta(2, 5, 2**30)
LONG, ONE, ROW = torch.int64, meta(dtype=torch.float32), torch.float32
LAST = {"memory_format": torch.channels_last}
CALLS = {
    "activation": lambda: activation.silu_fwd(FLAT),
    "activation backward": lambda: activation.silu_bwd(FLAT, FLAT),
    "dropout": lambda: dropout.seeded_dropout_bwd(FLAT, meta(dtype=LONG), 0.5, 0.5, (1,)),
    "loss": lambda: loss.mse_loss_fwd(FLAT, FLAT, "none"),
    "loss backward": lambda: loss.mse_loss_bwd(FLAT, FLAT, FLAT, "none"),
    "softmax of many rows": lambda: softmax.softmax_fwd(TALL, 1),
    "softmax backward of many rows": lambda: softmax.softmax_bwd(TALL, TALL, 1),
    "softmax, strided": lambda: softmax.softmax_fwd(DEEP, 1),
    "softmax backward, strided": lambda: softmax.softmax_bwd(DEEP, DEEP, 1),
    "cross-entropy of many rows": lambda: cross_entropy.cross_entropy_fwd(
        TALL, meta(2**31 + 7, dtype=LONG), None, "none", -100, None
    ),
    "cross-entropy, strided": lambda: cross_entropy.cross_entropy_fwd(
        DEEP, meta(2, 2**30, dtype=LONG), None, "none", -100, None
    ),
    "cross-entropy backward of many rows": lambda: cross_entropy.cross_entropy_bwd(
        ONE,
        TALL,
        meta(2**31 + 7, dtype=LONG),
        None,
        *[meta(2**31 + 7, dtype=ROW)] * 2,
        ONE,
        "mean",
        -100,
        None,
    ),
    "cross-entropy backward of wide rows": lambda: cross_entropy.cross_entropy_bwd(
        ONE, WIDE, meta(3, dtype=LONG), None, *[meta(3, dtype=ROW)] * 2, ONE, "mean", -100, None
    ),
    "nll backward, strided": lambda: cross_entropy.nll_loss_bwd(
        ONE, DEEP, meta(2, 2**30, dtype=LONG), None, ONE, "mean", -100
    ),
    # without the sum of the losses, which is one program's
    "cross-entropy once, of many rows": lambda: cross_entropy.losses_and_gradient(
        TALL, meta(2**31 + 7, dtype=LONG), None, -100, None, torch.empty_like(TALL), ONE
    ),
    "cross-entropy once, strided": lambda: cross_entropy.losses_and_gradient(
        DEEP, meta(2, 2**30, dtype=LONG), None, -100, None, torch.empty_like(DEEP), ONE
    ),
    "cross-entropy once, backward": lambda: cross_entropy.cross_entropy_once_bwd(FLAT, ONE),
    "cross-entropy of a chunk": lambda: linear_cross_entropy.losses_fwd(
        TALL, meta(2**31 + 7, dtype=LONG), None, -100, None, True
    ),
    "bias and activation of many rows": lambda: bias_act_dropout.bias_act_dropout_fwd(
        TALL, meta(3), meta(dtype=LONG), "gelu", 0.0, 0.5
    ),
    "bias and activation of wide rows": lambda: bias_act_dropout.bias_act_dropout_fwd(
        WIDE, meta(2**30 + 8), meta(dtype=LONG), "gelu", 0.0, 0.5
    ),
    "bias and activation backward of many rows": lambda: bias_act_dropout.bias_act_dropout_bwd(
        *[meta(2**31 + 512, 3)] * 2, meta(3), meta(dtype=LONG), "gelu", 0.0, 0.5, (True, False)
    ),
    "bias and activation backward of wide rows": lambda: bias_act_dropout.bias_act_dropout_bwd(
        WIDE, WIDE, meta(2**30 + 8), meta(dtype=LONG), "gelu", 0.0, 0.5, (True, True)
    ),
    "batch norm, rows": lambda: batch_norm.batch_norm_eval_fwd(
        meta(2**16, 33, 2**11), None, None, *[meta(33, dtype=ROW)] * 2, 1e-5
    ),
    "batch norm, columns": lambda: batch_norm.batch_norm_eval_fwd(
        meta(2**16, 33, 2**6, 2**5, **LAST), None, None, *[meta(33, dtype=ROW)] * 2, 1e-5
    ),
    "batch norm after a residual, rows": lambda: batch_norm.batch_norm_eval_fwd(
        meta(2**16, 33, 2**11),
        *[None] * 2,
        *[meta(33, dtype=ROW)] * 2,
        1e-5,
        meta(2**16, 33, 2**11),
        "silu",
    ),
    "batch norm backward after a residual": lambda: batch_norm.batch_norm_eval_bwd(
        *[meta(2**16, 33, 2**11)] * 2,
        *[meta(33, dtype=ROW)] * 3,
        1e-5,
        (True, False, False, True),
        None,
        meta(2**16, 33, 2**11),
        "silu",
    ),
    "batch norm backward": lambda: batch_norm.batch_norm_eval_bwd(
        *[meta(2**16, 33, 2**11)] * 2,
        None,
        *[meta(33, dtype=ROW)] * 2,
        1e-5,
        (True, False, False, False),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_they_reach_from_the_first_element_to_the_last(name, outer_programs):
    CALLS[name]()
    huge = [touched for touched in outer_programs.touched if touched[1].numel() > 2**31]
    assert huge
    for kernel, x, low, high in huge:
        assert (low, high) == (0, x.numel() - 1), kernel


@pytest.mark.parametrize("n", [2**31 + 3, 2**33 + 5])
@pytest.mark.parametrize("name", ["sgd_step", "rmsprop_step", "adam_step"])
def test_a_step_reaches_the_last_element_of_every_tensor(name, n, outer_programs):
    getattr(multi_tensor, name)(outer_programs.tables(n, columns=9), None, None, None)
    huge = [touched for touched in outer_programs.touched if touched[1].numel() > 1]
    assert len(huge) == 6  # gradient, parameter, average, three states
    assert {(low, high) for _, _, low, high in huge} == {(0, n - 1)}


def test_norms_and_clipping_reach_the_last_gradient(outer_programs):
    n = 2**31 + 3
    tables = outer_programs.tables(n, columns=1)
    multi_tensor.clip_grads(tables, multi_tensor.grad_norm(tables, None) + 4, 1.0)
    ends = {(kernel, low, high) for kernel, _, low, high in outer_programs.touched}
    assert ends == {("_squares_kernel", 0, n - 1), ("_clip_kernel", 0, n - 1)}
