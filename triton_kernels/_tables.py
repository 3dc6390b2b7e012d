"""Many tensors in one launch: tables on the device say where each lies, and who works on what.

======== ==================== ===================================================================
words    int64 (programs,)    a program's tensor in the upper half, its chunk of it in the lower
rows     int64 (columns,      of each tensor: its size, its flags with the number of its group
         tensors)             above them, then addresses, 0 for what is not there
numbers  float32 (groups,     of each group of tensors: hyperparameters
         numbers)
ticket   int32 (1,)           how many programs are done; the last one puts it back to 0
======== ==================== ===================================================================

The host keeps what it sent and sends again only what has changed, in a copy that nobody waits for.
While a CUDA graph is being captured everything is sent, to tables that are the graph's own: it
fills them again at each replay.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, driver

CHUNK = tl.constexpr(4096)  # elements a program
BLOCK = tl.constexpr(512)  # of them at a time: with 4 warps, a load of 128 bits a thread in float32

# The first columns. Addresses begin with the gradients'.
NUMEL = tl.constexpr(0)
FLAGS = tl.constexpr(1)
GRAD = tl.constexpr(2)

ALIGNED = tl.constexpr(1)  # every address is one of 16 bytes
STARTS = tl.constexpr(2)  # the state has seen no gradient yet
GROUP_SHIFT = tl.constexpr(2)

_words: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
_for_replays: dict[int, Tensor] = {}  # what captured graphs read and do not own


class Tables:
    """Where the tensors of a launch lie.

    Args:
        sizes: how many elements the tensors of each row have; it may be none.
        device: where all are.
        types: of each column of tensors, first the gradients; None for a column that has none.
    """

    def __init__(
        self, sizes: Sequence[int], device: torch.device, types: Sequence[torch.dtype | None]
    ) -> None:
        self.sizes = tuple(sizes)
        self.device = device
        self.types = [None] * GRAD.value + list(types)
        self.numbers: Tensor | None = None  # for norms and clipping
        self._forget()

    @property
    def tensors(self) -> int:
        return len(self.sizes)

    @property
    def words(self) -> Tensor:
        assert self._words is not None, "load comes first"
        return self._words

    @property
    def programs(self) -> int:
        return self.words.numel()

    def load(
        self,
        addresses: list[list[int]],
        groups: list[int] | None = None,
        starts: list[bool] | None = None,
        numbers: list[tuple[float, ...]] | None = None,
    ) -> None:
        """Let the device know where the tensors are, and the numbers of their groups.

        Args:
            addresses: a list of them for each column; 0 for a tensor that is not there.
            groups: the group of each row; all are in the first if None.
            starts: for each row, whether its state has seen no gradient yet.
            numbers: of each group.
        """
        on_gpu = self.device.type == "cuda"
        capturing = on_gpu and _captures(self.device)
        stream = driver.active.get_current_stream(self.device.index) if on_gpu else None
        if self._words is None or capturing or stream != self._stream:
            self._forget()  # another stream may yet read what it has been sent
            self._words = words_for(self.sizes, self.device, capturing)
            if on_gpu and not capturing:
                self._words.record_stream(torch.cuda.current_stream(self.device))
        grads, *others = addresses
        layout = others, groups, starts
        if layout != self._layout:
            self._marks = self._flags(*layout)
            self._layout = layout
            self._grads = None
        if grads != self._grads:
            self._send_rows(grads, others)
        if numbers != self._numbers:
            self.numbers = _sent(numbers or [], torch.float32, self.device)
            self._numbers = numbers
        if self.ticket is None and numbers is not None:  # norms and clipping count nothing
            self.ticket = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._stream = -1 if capturing else stream  # what a graph has been sent is its own

    def _forget(self) -> None:
        self._words: Tensor | None = None
        self._stream: int | None = None
        self._layout: Any = None
        self._grads: list[int] | None = None
        self._numbers: Any = None
        self.ticket: Tensor | None = None

    def _flags(
        self, others: list[list[int]], groups: list[int] | None, starts: list[bool] | None
    ) -> list[tuple[int, int]]:
        """Each row's flags but for its alignment, and the bits that would spoil that."""
        marks = []
        for i in range(self.tensors):
            bits = 0
            for column in others:
                bits |= column[i] % 16
            flags = (groups[i] if groups else 0) << GROUP_SHIFT.value
            marks.append((flags | STARTS.value * bool(starts and starts[i]), bits))
        return marks

    def _send_rows(self, grads: list[int], others: list[list[int]]) -> None:
        aligned = ALIGNED.value
        flags = [
            mark if (bits | grad) % 16 else mark | aligned
            for (mark, bits), grad in zip(self._marks, grads, strict=True)
        ]
        if self._grads is None or flags != self._sent_flags or self.rows.is_inference():
            rows = [list(self.sizes), flags, grads, *others]
            self.rows = _sent(rows, torch.int64, self.device)
        else:  # as so often, only gradients have moved
            moved = _on_host(grads, torch.int64, self.device)
            self.rows[GRAD.value].copy_(moved, non_blocking=True)
        self._grads, self._sent_flags = grads, flags


def _captures(device: torch.device) -> bool:
    """Whether the device's stream records a graph."""
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _sent(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for, which a graph makes again in each replay."""
    return _on_host(values, dtype, device).to(device, non_blocking=True)


def _on_host(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Pinned. Torch lends its memory to nobody else before the copy is made, and never to anybody
    # where a graph makes the copy.
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def words_for(sizes: tuple[int, ...], device: torch.device, capturing: bool = False) -> Tensor:
    """A word for each chunk of each tensor; an empty tensor has one, too."""
    key = sizes, device
    words = _words.get(key)
    if words is None and capturing:  # not there before the first replay, and so for nobody else
        return _new_words(sizes).pin_memory().to(device, non_blocking=True)
    if words is None:
        words = _new_words(sizes).to(device)
        while len(_words) >= 64:
            _words.pop(next(iter(_words)), None)  # another thread may have had the same one
        _words[key] = words
    if capturing:
        _for_replays[id(words)] = words
    return words


def _new_words(sizes: tuple[int, ...]) -> Tensor:
    with torch.device("cpu"):
        chunks = torch.tensor([max(1, cdiv(size, CHUNK.value)) for size in sizes])
        tensor = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
        first = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
        return tensor << 32 | torch.arange(len(tensor)) - first


@triton.jit
def place(words_ptr, rows_ptr, tensors):
    """The program's tensor, where its chunk of it starts and ends, and the tensor's flags."""
    word = tl.load(words_ptr + tl.program_id(0))
    tensor = word >> 32
    start = (word & 0xFFFFFFFF) * CHUNK
    end = tl.minimum(start + CHUNK, field(rows_ptr, NUMEL, tensors, tensor))
    return tensor, start, end, field(rows_ptr, FLAGS, tensors, tensor)


@triton.jit
def field(rows_ptr, column: tl.constexpr, tensors, tensor):
    """A column's entry for a tensor."""
    return tl.load(rows_ptr + column * tensors + tensor)


@triton.jit
def load(address, first, left, dtype: tl.constexpr, WHOLE: tl.constexpr):
    """A block from element ``first`` of the tensor at an address, as float32.

    ``left`` elements are left from there; WHOLE blocks are aligned and have BLOCK or more.
    """
    ptr = address.to(tl.pointer_type(dtype))
    i = tl.arange(0, BLOCK)
    if WHOLE:  # without a mask, and said of the pointer: of the address it would be forgotten
        return tl.load(tl.multiple_of(ptr, 16) + first + i).to(tl.float32)
    return tl.load(ptr + first + i, mask=i < left, other=0.0).to(tl.float32)


@triton.jit
def store(address, first, left, x, dtype: tl.constexpr, WHOLE: tl.constexpr):
    ptr = address.to(tl.pointer_type(dtype))
    i = tl.arange(0, BLOCK)
    if WHOLE:
        tl.store(tl.multiple_of(ptr, 16) + first + i, x.to(dtype))
    else:
        tl.store(ptr + first + i, x.to(dtype), mask=i < left)
