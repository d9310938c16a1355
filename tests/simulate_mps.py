"""Apple's device "mps", simulated on a CPU: it refuses what PyTorch refuses there, and computes on the CPU.

    with simulate_mps():
        torch.zeros(3, device="mps")

A tensor of the device holds a tensor of the CPU. Every operator of PyTorch that reaches it goes through
`SimulatedMps.run`, which raises the errors of the device: for float64 and complex128, for tensors of several devices,
for operators without a kernel, for adaptive pooling whose windows differ, and for copies that do not wait and would
hold other values. The random numbers of the device have a state of their own.

Which operators have a kernel is read from the file that PyTorch itself is generated from: native_functions.yaml, which
each release carries in its package ``torchgen`` ("MPS" in the dispatch of an operator, or "Composite...", which calls
others). The few others that run on the CPU by themselves are those of MPSFallback.mm in PyTorch's sources. Its issue
tracker describes adaptive pooling (an error for the average, other values for the maximum, where sizes are not
divisible) and copies (``non_blocking`` reads the source after it was released).

What this cannot show: errors of the kernels themselves, their rounding, limits of their dtypes and sizes, and speed.
Autocast casts in the operators in which that of the CPU does. What an operator "Composite..." calls is not looked up.
"""

import contextlib
import functools
import re
from pathlib import Path
from unittest import mock

import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode

MPS, CPU = torch.device("mps", 0), torch.device("cpu")
FLOAT64 = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
    "Please use float32 instead."
)
# C++ chooses the kernel of attention by the device, here the CPU; all of them compute the same.
ATTENTION = frozenset(f"aten::_scaled_dot_product_flash_attention_for_cpu{suffix}" for suffix in ("", "_backward"))
FALLBACKS = frozenset(
    "aten::" + name for name in ("embedding_renorm_", "linalg_svd", "linalg_svd.U", "col2im", "upsample_nearest3d.vec")
)
COPIES = frozenset(("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::copy"))
INDEXED = frozenset(
    f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
)
TAKES_NUMBERS = frozenset(f"aten::{name}" for name in ("where", "masked_fill", "masked_fill_", "fill", "fill_"))
POOLS = frozenset(("aten::_adaptive_avg_pool2d", "aten::adaptive_avg_pool2d", "aten::adaptive_max_pool2d"))


@functools.cache
def read_kernels():
    """Return whether the device has a kernel, by the name of the operator with its overload."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    dispatch, delegates, name, is_dispatch = {}, {}, "", False
    for line in path.read_text().splitlines():
        if match := re.match(r"- func: ([\w.]+)\(", line):
            name, is_dispatch = match[1], False
        elif match := re.match(r"  structured_delegate: ([\w.]+)", line):
            delegates[name] = match[1]
        elif line.startswith("  dispatch:"):
            is_dispatch, dispatch[name] = True, []
        elif is_dispatch and line.startswith("    "):
            dispatch[name] += re.split(r"[,\s]+", line.partition(":")[0].strip())
        elif line.strip() and not line.lstrip().startswith("#"):
            is_dispatch = False
    has = {name: any(key == "MPS" or key.startswith("Composite") for key in keys) for name, keys in dispatch.items()}
    return has | {name: has.get(target, True) for name, target in delegates.items()}


def has_kernel(function):
    """Return whether an operator runs on the device: operators that are not listed call others."""
    name = function.name()
    return name in FALLBACKS | ATTENTION or read_kernels().get(name.removeprefix("aten::"), True)


def change(function, value):
    """Return nested lists, tuples and dictionaries with ``function`` applied to all that they hold."""
    if isinstance(value, list | tuple):
        return type(value)(change(function, item) for item in value)
    if isinstance(value, dict):
        return {key: change(function, item) for key, item in value.items()}
    return function(value)


def list_tensors(*values):
    """Return the tensors in nested lists, tuples and dictionaries."""
    tensors = []
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += list_tensors(*value)
        elif isinstance(value, dict):
            tensors += list_tensors(*value.values())
    return tensors


class MpsTensor(torch.Tensor):
    """A tensor of the device; ``data_on_cpu`` holds its values, in the same memory.

    It says "mps" to Python. C++ takes it for a tensor of the CPU, because autograd would look for a device that this
    build of PyTorch does not have.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        tensor = torch.Tensor._make_subclass(cls, values)
        tensor.data_on_cpu = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return SimulatedMps.current.run(function, args, kwargs or {})

    device = property(lambda self: MPS)
    is_mps = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def cpu(self, memory_format=torch.preserve_format):
        return self.to("cpu", memory_format=memory_format)

    def numpy(self, *_, **__):
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    def __array__(self, *_, **__):
        return self.numpy()

    def pin_memory(self, *_):
        raise RuntimeError("cannot pin 'mps' only dense CPU tensors can be pinned")

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.detach().cpu().__reduce_ex__(protocol)  # torch.save copies to the CPU and stores the same bytes


def convert(tensor, *arguments, copy=False, **options):
    """`torch.Tensor.to`, which asks tensors for their device in C++, where those of the device are on the CPU."""
    if arguments and isinstance(arguments[0], torch.Tensor):
        arguments = (arguments[0].device, arguments[0].dtype, *arguments[1:])
    if isinstance(other := options.pop("other", None), torch.Tensor):
        options |= {"device": other.device, "dtype": other.dtype}
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*arguments, **options)
    device = tensor.device if device is None else MPS if device.type == "mps" else device
    dtype = dtype or tensor.dtype
    keeps_layout = layout in (None, torch.preserve_format) or tensor.is_contiguous(memory_format=layout)
    if not copy and device == tensor.device and dtype == tensor.dtype and keeps_layout:
        return tensor
    return torch.ops.aten._to_copy(
        tensor, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=layout or torch.preserve_format
    )


class SimulatedMps(TorchDispatchMode):
    """Runs every operator that a tensor of the device, or ``device="mps"``, takes part in."""

    current = None

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else torch imports its compiler, which takes seconds

    def __init__(self):
        super().__init__()
        self.random = torch.Generator().get_state()
        self.called = set()  # names of the operators

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        is_created = device is not None and torch.device(device).type == "mps"
        if is_created or any(isinstance(tensor, MpsTensor) for tensor in list_tensors(args, kwargs)):
            return self.run(function, args, kwargs)
        return function(*args, **kwargs)

    def run(self, function, args, kwargs):
        """Run an operator as the device does."""
        name = function.name().partition(".")[0]
        if function.namespace != "aten":  # the kernel that the dispatcher would choose for the device
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.MPS)
            with self.entered():
                return function.redispatch(keys, *args, **kwargs)
        if function.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self.entered():
                return function.decompose(*args, **kwargs)
        self.called.add(function.name())
        if not has_kernel(function):
            raise NotImplementedError(
                f"The operator '{function.name()}' is not currently implemented for the MPS device."
            )
        check_devices(name, function, args, kwargs)
        if name in POOLS and any(size % count for size, count in zip(args[0].shape[-2:], args[1], strict=True)):
            raise RuntimeError("Adaptive pool MPS: input sizes must be divisible by output sizes.")
        target = kwargs.get("device")
        if target is not None:
            kwargs = kwargs | {"device": CPU}
        # A gradient goes back to the device that C++ takes its tensor to be on: see `MpsTensor`.
        is_backward = torch._C._current_graph_task_id() != -1
        is_away = name == "aten::_to_copy" and torch.device(target or MPS).type != "mps" and not is_backward
        given = list_tensors(args, kwargs)
        args, kwargs = change(lambda leaf: leaf.data_on_cpu if isinstance(leaf, MpsTensor) else leaf, (args, kwargs))
        with self.own_random_numbers() if torch.Tag.nondeterministic_seeded in function.tags else nullcontext():
            result = function(*args, **kwargs)
        outer = {id(value): tensor for value, tensor in zip(list_tensors(args, kwargs), given, strict=True)}
        return change(lambda leaf: self.wrap(leaf, outer, is_away), result)

    def wrap(self, value, outer, is_away):
        """Return a result as a tensor of the device, or the argument that was changed in place."""
        if not isinstance(value, torch.Tensor) or id(value) in outer or is_away:
            return outer.get(id(value), value)
        if value.dtype in (torch.float64, torch.complex128):
            raise TypeError(FLOAT64 if value.dtype == torch.float64 else FLOAT64.replace("float64", "complex128"))
        return MpsTensor(value)

    @contextlib.contextmanager
    def entered(self):
        """Take part in what an operator calls: PyTorch leaves a mode while it handles an operator."""
        with self:
            yield

    @contextlib.contextmanager
    def own_random_numbers(self):
        """Draw from the generator of the device."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(before)

    def seed(self, number):
        self.random = torch.Generator().manual_seed(number).get_state()

    def set_random_state(self, state, device="mps"):
        self.random = state.clone()


nullcontext = contextlib.nullcontext


def check_devices(name, function, args, kwargs):
    """Raise the error of PyTorch for tensors of several devices, and for copies that do not wait."""
    tensors = list_tensors(args, kwargs)
    if name in COPIES:
        is_waiting = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else tensors[0].device
        if not is_waiting and {target.type, *(t.device.type for t in tensors)} == {"cpu", "mps"}:
            raise RuntimeError("simulated mps: a copy that does not wait holds other values (non_blocking)")
        return
    if kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'mps' device type for generator but found 'cpu'")
    if name in INDEXED:
        tensors = [tensors[0], *(t for t in tensors[1:] if t.device != CPU)]
    elif torch.Tag.pointwise in function.tags or name in TAKES_NUMBERS or "_foreach_" in name:
        tensors = [t for t in tensors if t.ndim or t.device != CPU]
    if len({t.device for t in tensors}) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, mps:0 and cpu! ({name})"
        )


@contextlib.contextmanager
def simulate_mps():
    """Let this process have one device "mps" within a block.

    Yields:
        The device, whose ``called`` holds the names of the operators that ran.
    """
    simulated = SimulatedMps.current = SimulatedMps()
    create, wrap, autocast = torch.tensor, torch.as_tensor, torch.autocast

    def on_device(function):
        def build(values, *, device=None, **options):
            return convert(function(values, **options), device) if device is not None else function(values, **options)

        return build

    def cast(device_type, *arguments, **options):
        """Cast in the operators in which the CPU does: C++ takes tensors of the device for those of the CPU."""
        return autocast("cpu" if device_type == "mps" else device_type, *arguments, **options)

    patches = [
        mock.patch.object(torch.accelerator, "is_available", lambda *_: True),
        mock.patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("mps")),
        mock.patch.object(torch.accelerator, "device_count", lambda: 1),
        mock.patch.object(torch, "autocast", cast),
        mock.patch.object(torch.mps, "manual_seed", simulated.seed),
        mock.patch.object(torch.mps, "get_rng_state", lambda *_: simulated.random.clone()),
        mock.patch.object(torch.mps, "set_rng_state", simulated.set_random_state),
        mock.patch.object(torch.mps, "synchronize", lambda: None),
        mock.patch.object(torch, "tensor", on_device(create)),
        mock.patch.object(torch, "as_tensor", on_device(wrap)),
        mock.patch.object(torch.Tensor, "to", convert),
        # `nn.Module.to` would put values of the device into the old parameter, which is no tensor of the device.
        mock.patch.object(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(simulated)
        yield simulated
    SimulatedMps.current = None
