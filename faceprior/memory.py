"""`Rehearsal`: code runs on tensors without data, and the memory that it would take is counted, part by part.

    with Rehearsal() as rehearsal:
        network = UNet2DConditionModel.from_config(config)         # no weight is drawn or loaded
        rehearsal.name("U-Net", network)
        with rehearsal.phase("training"):
            network(latents, timesteps, embeds).sample.mean().backward()
    rehearsal.peaks["training"]                                    # {"U-Net": bytes, "activations": bytes}

torch's fake tensors have shapes, dtypes and storages, and no data: the real code runs on them, with its real modules,
autograd and optimizers, in seconds, and each storage that is alive is counted until it is freed. Storages are rounded
up to 512 bytes, as CUDA's allocator does. Not counted is what takes memory outside of tensors: CUDA's context, the
workspaces of its libraries, fragmentation.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from transformers.initialization import no_init_weights

ACTIVATIONS, GRADIENTS, OPTIMIZER = "activations", "gradients", "optimizer state"
ELSEWHERE = ""  # part of what is not counted
# phases
ENCODING, TRAINING, UPDATE, SAMPLES = "encoding", "training", "optimizer step", "samples"
_BLOCK = 512  # bytes


class Rehearsal:
    """A place where tensors have no data, and a count of their memory by part and phase.

    device: what is planned for. Fake tensors are always a CPU's; for `cuda` autocast and the optimizers do as they do
    there. fake: False runs and counts the real thing, on a CPU.

    peaks: phase -> part -> bytes, at the moment of the phase when most memory is in use.
    """

    def __init__(self, device: str = "cuda", fake: bool = True):
        if device not in ("cuda", "cpu"):
            raise ValueError(f"`device` has to be cuda or cpu but is {device!r}")
        self.device, self.fake = device, fake
        self.peaks: dict[str, dict[str, int]] = {}
        self._live = _LiveBytes(self)
        self._phase: str | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Rehearsal:
        if self.fake:
            self._stack.enter_context(_modules_take_fakes())
            self._stack.enter_context(no_init_weights())  # it draws until the values lie within bounds
            if self.device == "cuda":
                self._stack.enter_context(_autocast_as_on_cuda())
            self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # constants of modules
        self._stack.enter_context(self._live)
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    @property
    def peak(self) -> int:
        """The bytes of the highest phase."""
        return max((sum(parts.values()) for parts in self.peaks.values()), default=0)

    # ---- parts

    def name(self, part: str, *owners: nn.Module | Tensor) -> None:
        """Count tensors, and the weights and buffers of modules, as `part`; what has no name is an activation."""
        for owner in owners:
            for tensor in _tensors_of(owner) if isinstance(owner, nn.Module) else [owner]:
                self._live.label(tensor, part)

    def name_rest(self, part: str) -> None:
        """Count as `part` whatever is alive and has no name yet."""
        self._live.label_rest(part)

    def leave_rest(self) -> None:
        """Do not count whatever is alive and has no name yet where a GPU is planned for: it lies on the CPU there."""
        if self.device == "cuda":
            self._live.leave_rest()

    def name_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Name an optimizer's state, which exists after its first step."""
        tensors = [*tree_iter(list(optimizer.state.values())), *getattr(optimizer, "name2qmap", {}).values()]
        self.name(OPTIMIZER, *(tensor for tensor in tensors if isinstance(tensor, Tensor)))

    def name_pipeline(self, pipeline: Any, trained: Iterable[nn.Parameter] = ()) -> None:
        """Name a diffusers pipeline's networks, and the weights that are trained; encoding is a phase of its own."""
        trained, kinds = list(trained), defaultdict(list)
        for name, module in pipeline.components.items():
            if isinstance(module, nn.Module):
                kinds["text encoders" if name.startswith("text_encoder") else _NAMES.get(name, name)].append(module)
        for kind, modules in kinds.items():
            self.name(", ".join(filter(None, (kind, _dtype_of(modules, trained)))), *modules)
            if kind in ("VAE", "text encoders"):
                for module in modules:
                    for part in (module.encoder, module.decoder) if kind == "VAE" else [module]:
                        self._follow(part)
        self.name("trained weights", *trained)

    def _follow(self, module: nn.Module) -> None:
        """Let a module's passes within the training count as the phase ENCODING."""
        within: list[nn.Module] = []

        def enter(_, inputs: tuple) -> None:
            if self._phase == TRAINING and not any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
                self._set_phase(ENCODING)
                within.append(module)

        def leave(*_) -> None:
            if within:
                within.pop()
                self._set_phase(TRAINING)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    @contextmanager
    def away(self, *modules: nn.Module) -> Iterator[None]:
        """Do not count modules that are on another device meanwhile."""
        self._put(modules, there=False)
        try:
            yield
        finally:
            self._put(modules, there=True)

    @contextmanager
    def away_by_layer(self, *modules: nn.Module) -> Iterator[None]:
        """Count of modules only the layer that is at work, as accelerate's `cpu_offload` brings them, one by one."""
        handles = []
        for layer in (layer for module in modules for layer in module.modules()):
            if layer._parameters:
                handles.append(layer.register_forward_pre_hook(lambda layer, *_: self._put([layer], there=True)))
                handles.append(layer.register_forward_hook(lambda layer, *_: self._put([layer], there=False)))
        try:
            with self.away(*modules):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _put(self, modules: Iterable[nn.Module], there: bool) -> None:
        for tensor in (tensor for module in modules for tensor in _tensors_of(module)):
            (self._live.add if there else self._live.forget)(tensor)

    # ---- phases

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Keep the highest count of the time within as that of the phase `name`."""
        outer = self._phase
        self._set_phase(name)
        try:
            yield
        finally:
            self._set_phase(outer)

    def _set_phase(self, name: str | None) -> None:
        self._phase = name
        self._notice()

    def _notice(self, extra: int = 0) -> None:
        """Compare the count, and `extra` bytes that no tensor shows, with the highest one of the phase."""
        if self._phase is None:
            return
        now = self._live.now + extra
        if now > self._live.highest.get(self._phase, -1):
            self._live.highest[self._phase] = now
            parts = self.peaks[self._phase] = {part: size for part, size in self._live.parts.items() if size}
            if extra:
                parts[ACTIVATIONS] = parts.get(ACTIVATIONS, 0) + extra

    def step(
        self,
        compute_loss: Callable[[], Tensor],
        trained: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        accumulation: int = 1,
        autocast: Callable[[], Any] = nullcontext,
    ) -> None:
        """Take an optimizer step, and a micro-batch of the next one: phases UPDATE, ENCODING and TRAINING.

        So the optimizer's state exists from the start, as in all steps but the first. accumulation: with more than one
        micro-batch in a step, the gradients of the former ones exist, too; autocast: gives the context of the
        micro-batch, its backward pass included.
        """
        trained = list(trained)
        if self.device == "cuda":  # torch's choice there: all weights at once, with temporary copies of their size
            for group in optimizer.param_groups:
                group |= {"foreach": True} if "foreach" in group else {}

        # ---- the optimizer's state, and a step with it
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: self.name(GRADIENTS, p.grad))
        self.name(GRADIENTS, *(parameter.grad for parameter in trained))
        optimizer.step()
        self.name_state(optimizer)
        with self.phase(UPDATE):
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        if accumulation == 1:
            optimizer.zero_grad()

        # ---- a micro-batch
        with self.phase(TRAINING), autocast():
            loss = compute_loss()
            loss.backward()
            del loss
        optimizer.zero_grad()


_NAMES = {"unet": "U-Net", "transformer": "transformer", "vae": "VAE", "controlnet": "ControlNet"}


def _dtype_of(modules: list[nn.Module], trained: list[nn.Parameter]) -> str:
    """Return the dtype of the networks' frozen weights; of quantized ones also that of the rest, such as convolutions.

    Empty if all are trained.
    """
    sizes, others = Counter(), {id(parameter) for parameter in trained}
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        sizes[parameter.dtype] += 0 if id(parameter) in others else parameter.nbytes
    quantized = {torch.uint8: "4-bit", torch.int8: "8-bit"}
    plain = [str(kind).removeprefix("torch.") for kind, size in sizes.most_common() if size and kind not in quantized]
    return " and ".join([*(name for kind, name in quantized.items() if kind in sizes), *plain[:1]])


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Return a module's parameters and buffers, and what bitsandbytes' layers keep beside them."""
    for part in module.modules():
        yield from part.parameters(recurse=False)
        yield from part.buffers(recurse=False)
        places = [getattr(part, "state", None), getattr(getattr(part, "weight", None), "quant_state", None)]
        places += [getattr(place, "state2", None) for place in places]
        for place in places:
            yield from (value for value in getattr(place, "__dict__", {}).values() if isinstance(value, Tensor))


# ---- the count


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive: `now`, in `parts`, and the `highest` of each phase."""

    def __init__(self, rehearsal: Rehearsal):
        super().__init__()
        self.now, self.parts, self.highest = 0, Counter(), {}
        self._rehearsal = rehearsal
        self._entries: weakref.WeakKeyDictionary[Any, list] = weakref.WeakKeyDictionary()  # storage -> [part, bytes]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = _run_on_fakes(function, args, kwargs) if self._rehearsal.fake else function(*args, **kwargs)
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        # What lives within a kernel on a GPU: 4 bits have none of many rows, so that the product is by the weights in
        # 16 bits; 8 bits are added up in 32
        if function.name() == "bitsandbytes::gemm_4bit":
            self._rehearsal._notice(math.prod(args[2]) * args[0].element_size())
        elif function.name() in ("bitsandbytes::int8_scaled_mm", "bitsandbytes::int8_mixed_scaled_mm"):
            self._rehearsal._notice(4 * next(leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor)).numel())
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._entries:
            entry = self._entries[storage] = [ACTIVATIONS, 0]
            weakref.finalize(storage, self._count, entry, 0)
            self._count(entry, -(-storage.nbytes() // _BLOCK) * _BLOCK)
            self._rehearsal._notice()
        elif self._entries[storage][1] == 0 and self._entries[storage][0] != ELSEWHERE:
            self._count(self._entries[storage], -(-storage.nbytes() // _BLOCK) * _BLOCK)

    def label(self, tensor: Tensor, part: str) -> None:
        self.add(tensor)
        self._move(self._entries[tensor.untyped_storage()], part)

    def label_rest(self, part: str) -> None:
        for entry in self._entries.values():
            if entry[0] == ACTIVATIONS:
                self._move(entry, part)

    def leave_rest(self) -> None:
        for entry in self._entries.values():
            if entry[0] == ACTIVATIONS:
                self._count(entry, 0)
                entry[0] = ELSEWHERE

    def forget(self, tensor: Tensor) -> None:
        self._count(self._entries[tensor.untyped_storage()], 0)

    def _move(self, entry: list, part: str) -> None:
        size = entry[1]
        self._count(entry, 0)
        entry[0] = part
        self._count(entry, size)

    def _count(self, entry: list, size: int) -> None:
        part, before = entry
        entry[1] = size
        self.now += size - before
        self.parts[part] += size - before


def _run_on_fakes(function, args, kwargs):
    """Run an operation on fake tensors. Who asks for a value gets True, 1.0 or, as that is a place, 0.

    int8_...: bitsandbytes looks for outliers, whose number depends on the values: there are none.
    """
    name = function.name()
    if name == "bitsandbytes::int8_vectorwise_quant" and (args[1:] or kwargs):
        codes, scales, _ = function(args[0])
        return codes, scales, args[0].new_empty(0, dtype=torch.int64)
    if name == "bitsandbytes::int8_mixed_scaled_mm":
        inputs, codes, weights, scales, weight_scales, *_ = args
        product = torch.ops.bitsandbytes.int8_scaled_mm.default
        return product(codes, weights, scales, weight_scales, dtype=inputs.dtype), None
    if name == "aten::mse_loss" and tuple(args[2:]) != (0,):  # the mean lies where all the squares did
        return torch.empty_like(args[0]).as_strided((), ())
    if name == "aten::nonzero":
        return args[0].new_zeros((1, args[0].ndim), dtype=torch.int64)
    if name == "aten::index.Tensor":  # a mask stands for the places where it is true: all of them
        masks = [
            [i] if i is None or i.dtype != torch.bool else i.ndim * [i.new_zeros(i.numel(), dtype=torch.int64)]
            for i in args[1]
        ]
        args = (args[0], [place for places in masks for place in places])
    try:
        return function(*args, **kwargs)
    except DataDependentOutputException:
        kind = torch.bool if name == "aten::equal" else args[0].dtype
        return True if kind == torch.bool else 1.0 if kind.is_floating_point else 0


@contextmanager
def _modules_take_fakes() -> Iterator[None]:
    """Let modules change the device and dtype of fake parameters, and bitsandbytes make its parameters of them."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel that this CPU lacks
    import bitsandbytes  # seconds, and a stage that only trains needs none of it

    # fakes are a CPU's, and code that looks for a GPU to work on would send them there
    has_gpu = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    apply, make, tables = nn.Module._apply, torch.Tensor._make_subclass, dict(bitsandbytes.functional.name2qmap)

    def apply_to_fakes(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # torch would swap a fake parameter with its successor, which it cannot while the fakes' mode refers to them
        for child in module.children() if recurse else ():
            child._apply(function)
        for parameter in [parameter for parameter in module._parameters.values() if parameter is not None]:
            with torch.no_grad():
                changed = function(parameter)
            if changed is not parameter:
                parameter.data = changed
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else function(buffer)
        return module

    def make_fake(kind: type, data: Tensor, *arguments, **options) -> Tensor:
        if not isinstance(data, FakeTensor) or issubclass(kind, FakeTensor):
            return make(kind, data, *arguments, **options)
        fake_kind = type(kind.__name__, (FakeTensor, kind), {})
        with no_dispatch():
            shape = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device="meta")
        fake = FakeTensor.__new__(fake_kind, data.fake_mode, shape, data.device)
        fake.data = data
        return fake.requires_grad_(*arguments[:1], **options)

    def ones(fake: FakeTensor, **options) -> np.ndarray:
        return np.ones(fake.shape, str(fake.dtype).removeprefix("torch."))

    nn.Module._apply, torch.Tensor._make_subclass = apply_to_fakes, staticmethod(make_fake)
    FakeTensor.numpy = ones  # see _run_on_fakes
    bitsandbytes.functional.name2qmap.clear()  # else its tables of before are met, which are no fakes
    try:
        yield
    finally:
        nn.Module._apply, torch.cuda.is_available = apply, has_gpu
        del torch.Tensor._make_subclass, FakeTensor.numpy
        bitsandbytes.functional.name2qmap.clear()
        bitsandbytes.functional.name2qmap.update(tables)


# ---- autocast on CUDA

# What autocast computes in float32 on CUDA, but in the inputs' dtype on a CPU: norms above all, so that what is kept
# for the backward pass there takes twice the memory ("Autocast Op Reference" of torch.amp).
FLOAT32_ON_CUDA = [
    "group_norm",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "softmax.int",
    "log_softmax.int",
    "logsumexp",
    "softplus",
    "pow.Scalar",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "exp",
    "expm1",
    "log",
    "log10",
    "log1p",
    "log2",
    "rsqrt",
    "reciprocal",
    "sum",
    "sum.dim_IntList",
    "cumsum",
    "cumprod",
    "norm.Scalar",
    "norm.ScalarOpt_dim",
    "linalg_vector_norm",
    "cosine_similarity",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
]


@contextmanager
def _autocast_as_on_cuda() -> Iterator[None]:
    """Give autocast on a CPU the rules of CUDA."""

    def rule(operation):
        def in_float32(*args, **kwargs):
            args, kwargs = tree_map_only(Tensor, _to_float32, (args, kwargs))
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
                return operation(*args, **kwargs)

        return in_float32

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in FLOAT32_ON_CUDA:
            packet, _, overload = name.partition(".")
            library.impl(name, rule(getattr(getattr(torch.ops.aten, packet), overload or "default")), "AutocastCPU")
        yield


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
