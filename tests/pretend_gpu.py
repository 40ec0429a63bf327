"""A pretend accelerator on a CPU build of PyTorch, which counts what a real one would be slow at.

Inside `PretendGPU()` tensors can be made on device `gpu:0`. They hold CPU data, so values, control flow that depends on
them, gradients and recomputation are the CPU's own; mixing them with tensors of the CPU raises as on CUDA. Counted, by
the line of ee_megatron or megatron that asked (`counting`, `Counts`):

- syncs: the host waits for a value: `.item()`, `.tolist()`, `nonzero`, boolean indices, copies to the CPU
- copies: from the host to the device
- pageable: copies in either direction with memory of the host that isn't pinned, or that block: on CUDA the host waits
  for all that was launched before, and they are several times as slow
- kernels: operations that would launch one; fused ones (torch.compile is off here) count by their parts
- duplicates: the most often any element is hit by one accumulating `index_put` or `index_add`, which CUDA serialises
- unordered: `index_add`s that hit an element of bfloat16 twice or more, rounded after each, in CUDA's order of the day

and bytes that are alive (`memory`).

Blind to: streams and asynchronous errors; NCCL (collectives run on gloo); data pointers, and so compiled kernels;
resizes of outputs; CUDA's own limits (dtypes, shapes, determinism); the allocator's fragmentation and workspaces;
CUDA's random numbers (the CPU's are drawn); what DeepSpeed's engine does; inference mode (its tensors are ordinary ones
here); 0-dimensional CPU tensors in elementwise operations, which CUDA takes too.

The backend's name and what is patched (`torch.tensor`, `torch.as_tensor`, `Module._apply`) concern a whole process, and
the name can't be taken back: use it in a process of its own (tests/integration/ranks.py), never in that of pytest.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "gpu"
KINDS = ("syncs", "copies", "pageable", "kernels", "unordered")

# Operations by what CUDA does with them. Results whose size depends on values make the host wait.
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive",
         "equal", "is_nonzero"}  # fmt: skip
# What passes no work to the device, beside operations that only make views.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_fused_sdp_choice", "detach",
             "_unsafe_view", "reshape", "_reshape_alias", "_local_scalar_dense", "lift_fresh", "set_",
             "resize_"}  # fmt: skip
MOVES = {"_to_copy", "copy_", "_copy_from", "_copy_from_and_resize"}
# What CUDA has and a CPU hasn't.
DEVICE_ONLY = {torch.ops.aten.mm.dtype: lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype)}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}

_torch_tensor, _torch_as_tensor = torch.tensor, torch.as_tensor
_module_apply = torch.nn.Module._apply


class Counts:
    """What was asked of the device: for each of KINDS a Counter of "file:line", and the worst `duplicates`."""

    def __init__(self) -> None:
        self.sites: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.operations: Counter[str] = Counter()
        self.duplicates = 0

    def note(self, kind: str, operation: str) -> None:
        self.sites[kind][_site()] += 1
        if kind == "kernels":
            self.operations[operation] += 1

    def totals(self) -> dict[str, int]:
        return {kind: sum(self.sites[kind].values()) for kind in KINDS} | {"duplicates": self.duplicates}

    def top(self, kind: str, count: int = 8) -> list[tuple[str, int]]:
        """The lines that most come from; of kernels, the operations."""
        return (self.operations if kind == "kernels" else self.sites[kind]).most_common(count)


class Memory:
    """Bytes of the device's storages that are alive."""

    def __init__(self) -> None:
        self.live = 0
        self._storages: dict[int, list[int]] = {}

    def hold(self, raw: torch.Tensor) -> _Held:
        storage = raw.untyped_storage()
        entry = self._storages.setdefault(storage._cdata, [0, storage.nbytes()])
        if not entry[0]:
            self.live += entry[1]
        entry[0] += 1
        return _Held(self, storage._cdata)

    def release(self, key: int) -> None:
        entry = self._storages[key]
        entry[0] -= 1
        if not entry[0]:
            self.live -= entry[1]
            del self._storages[key]


class _Held:
    """A pretend tensor's hold on its storage's entry; it lets go with the tensor."""

    __slots__ = ("key", "memory")

    def __init__(self, memory: Memory, key: int):
        self.memory, self.key = memory, key

    def __del__(self) -> None:
        self.memory.release(self.key)


memory = Memory()
_counts = Counts()
_places: dict[str, str | None] = {}


def _site() -> str:
    """The innermost line of ee_megatron or megatron on the stack that isn't the helper of all transfers; "autograd" in
    the backward pass's own thread."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name not in _places:
            parts = Path(name).parts
            root = next((i for i, part in enumerate(parts) if part in ("ee_megatron", "megatron")), None)
            place = None if root is None else "/".join(parts[root:])
            _places[name] = None if place == "ee_megatron/tensors.py" else place
        if place := _places[name]:
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count afresh inside; what was counted before goes on afterwards."""
    global _counts
    before, _counts = _counts, Counts()
    try:
        yield _counts
    finally:
        _counts = before


class PretendTensor(torch.Tensor):
    """A tensor that says it is on `gpu:0`; `raw` is the CPU tensor that it stands for."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> PretendTensor:
        # Never an inference tensor: a subclass's views can't be.
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
                device=torch.device(NAME, 0), requires_grad=False,
            )  # fmt: skip
        made.raw = raw
        made.held = memory.hold(raw)
        return made

    def __init__(self, raw: torch.Tensor):
        pass

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.raw})"

    def tolist(self) -> Any:
        _counts.note("syncs", "tolist")
        _counts.note("pageable", "tolist")
        return self.raw.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; copy it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendGPU(TorchDispatchMode):
    """Inside, device `gpu:0` is there. Raises RuntimeError in pytest's own process."""

    def __enter__(self) -> PretendGPU:
        register()
        torch.tensor, torch.as_tensor = _tensor, _as_tensor  # type: ignore[assignment]
        torch.nn.Module._apply = _apply  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.tensor, torch.as_tensor = _torch_tensor, _torch_as_tensor
        torch.nn.Module._apply = _module_apply  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """`PretendGPU` without its patches, for the parts of an operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


class _Stream:
    """The device's only one."""

    def synchronize(self) -> None:
        _counts.note("syncs", "synchronize")


def register() -> None:
    """Give the device its name; before the first backward pass of the process, which makes a queue per device."""
    if "_pytest" in sys.modules and multiprocessing.parent_process() is None:
        raise RuntimeError("the pretend GPU can't be taken back: use it in a process of its own, not in pytest's")
    if torch._C._get_privateuse1_backend_name() != NAME:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(NAME)
        # Recomputation restores autocast as it was: off.
        getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
        getattr(torch, NAME).current_stream = lambda device=None: _Stream()


def _tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which makes its result without asking the dispatcher."""
    made = _torch_tensor(_raw(data), **options)
    return made if device is None else made.to(device)


def _as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    made = data if isinstance(data, torch.Tensor) else _torch_as_tensor(data)
    return made.to(device=device or made.device, dtype=dtype or made.dtype)


def _apply(module: torch.nn.Module, change: Any, *rest: Any) -> torch.nn.Module:
    """`Module._apply`, which `.to` is made of. On CUDA a parameter stays the same object; here another takes its place,
    with what was written on it."""
    before = dict(module._parameters)
    _module_apply(module, change, *rest)
    for name, old in before.items():
        new = module._parameters[name]
        if new is not None and new is not old:
            vars(new).update({key: value for key, value in vars(old).items() if key not in ("raw", "held")})
    return module


def _raw(x: Any) -> Any:
    return x.raw if isinstance(x, PretendTensor) else x


def _wrapped(x: Any) -> Any:
    return PretendTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor) else x


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operation: refused if it mixes devices, counted, run on what the pretend tensors stand for."""
    if _composite(func):
        # Inference mode hands these over whole; what they are made of is what a device sees.
        with _Dispatch():
            return func.decompose(*args, **kwargs)
    name = func._schema.name.split("::")[1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, PretendTensor)]
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if func.namespace == "c10d":
        if ours:
            _counts.note("kernels", name)
        return func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    if name in MOVES:
        return _move(func, name, args, kwargs, asked)
    if name == "is_pinned":
        return _is_pinned(args[0])
    if name == "_pin_memory" or kwargs.get("pin_memory"):
        # A CPU build pins nothing; the storage says that it is.
        made = args[0].clone() if name == "_pin_memory" else func(*args, **{**kwargs, "pin_memory": False})
        made.untyped_storage().pinned = True
        return made
    there = asked.type == NAME if asked is not None else bool(ours)
    if not there and not ours:
        return func(*args, **kwargs)
    _refuse_mixing(func, name, args, tensors)
    _count_waiting(name, args, kwargs)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = DEVICE_ONLY.get(func, func)(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    _count_launch(func, name, result)
    if not there:
        return result
    result = tree_map(_wrapped, result)
    aliasing = any(returned.alias_info for returned in func._schema.returns)
    return return_and_correct_aliasing(func, args, kwargs, result) if aliasing else result


@functools.cache
def _composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _move(func: Any, name: str, args: tuple, kwargs: dict, asked: torch.device | None) -> Any:
    """Copies within the device and between it and the host."""
    target, source = (args[0], args[1]) if name != "_to_copy" else (None, args[0])
    to = target.device.type if target is not None else asked.type if asked is not None else source.device.type
    if source.device.type != to:
        host = source if to == NAME else target
        dtype = target.dtype if target is not None else kwargs.get("dtype") or source.dtype
        # What changes its dtype, or has gaps, goes by way of memory that isn't pinned.
        pinned = host is not None and _is_pinned(host) and host.is_contiguous() and source.dtype == dtype
        waits = not (pinned and (kwargs.get("non_blocking") or True in args[2:3]))
        if to == NAME or waits:
            _counts.note("copies" if to == NAME else "syncs", name)
        if waits:
            _counts.note("pageable", name)
    elif to == NAME:
        _counts.note("kernels", name)
    if target is not None:
        _raw(target).copy_(_raw(source))
        return target
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    made = func(_raw(source), **kwargs)
    if made is _raw(source):
        made = made.clone()
    return PretendTensor(made) if to == NAME else made


def _is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "pinned", False)


def _refuse_mixing(func: Any, name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
    strangers = [x for x in tensors if not isinstance(x, PretendTensor)]
    if not strangers or len(strangers) == len(tensors):
        return
    # CUDA takes index tensors from the CPU, at the price of a copy each, and scalars in elementwise operations.
    index = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)] if name in INDEXING else []
    if name in INDEXING and isinstance(args[0], PretendTensor):
        for x in index:
            if not isinstance(x, PretendTensor):
                _counts.note("copies", name)
                _counts.note("pageable", name)
        strangers = [x for x in strangers if not any(x is i for i in index)]
    scalars = (
        torch.Tag.pointwise in func.tags or name in INDEXING or name.startswith(("masked_fill", "fill", "_foreach"))
    )
    if any(x.dim() or not scalars for x in strangers):
        found = [(x.device.type, tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {found}")


def _count_launch(func: Any, name: str, result: Any) -> None:
    """A kernel, unless nothing is computed: a view, fresh memory, results without an element."""
    if func.is_view or name in NO_KERNEL:
        return
    tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
    if not tensors or any(x.numel() for x in tensors):
        _counts.note("kernels", name)


def _count_waiting(name: str, args: tuple, kwargs: dict) -> None:
    """What makes the host wait, and what makes parts of a kernel wait for each other."""
    if name in SYNCS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _counts.note("syncs", name)
    elif name in INDEXING:
        index = [_raw(x) for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in index):
            _counts.note("syncs", "boolean index")
        elif "index_put" in name and len(args) > 3 and args[3]:
            _counts.duplicates = max(_counts.duplicates, _most_hits(_raw(args[0]), args[1]))
    elif name in ("index_add", "index_add_") and args[2].numel():
        most = int(torch.bincount(_raw(args[2])).max())
        _counts.duplicates = max(_counts.duplicates, most)
        if most > 1 and args[0].dtype == torch.bfloat16:
            _counts.note("unordered", name)


def _most_hits(target: torch.Tensor, index: Any) -> int:
    """How often the most frequent of an accumulating index's places occurs."""
    raws = torch.broadcast_tensors(*[_raw(x) for x in index if x is not None])
    place = torch.zeros_like(raws[0], dtype=torch.int64)
    for raw, size in zip(raws, [target.size(d) for d, x in enumerate(index) if x is not None], strict=True):
        place = place * size + raw % size
    return int(place.flatten().unique(return_counts=True)[1].max()) if place.numel() else 0
