"""The programs that tools/benchmark.py times, compiled for all devices of this process.

Needs neither a data set, nor TensorFlow, nor ml_collections.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.info import IMAGENET_MEAN, IMAGENET_STD
from deit_jax.models.network import Network, Variables, split_model
from deit_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from deit_jax.planning import chips
from deit_jax.training import mixing, optim
from deit_jax.training.state import new_state
from deit_jax.training.step import make_train_step
from deit_jax.training.teacher import teacher_forward

CLASSES = 1000


class Work(NamedTuple):
    """What is timed: `part` is train, infer or teacher; `batch` images of all devices a step."""

    part: str
    model: str
    batch: int
    dtype: str
    teacher: str = ""  # training with hard distillation from this model; "": without a teacher
    ema: bool = False
    drop_path_rate: float = 0.0

    def recipe(self) -> SimpleNamespace:
        """The fields of DeiT's recipe that a training step reads, as a ConfigDict has them."""
        return SimpleNamespace(
            input=SimpleNamespace(mean=IMAGENET_MEAN, std=IMAGENET_STD),
            mixing=SimpleNamespace(
                random_erasing=0.25, mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0,
                switch_prob=0.5, smoothing=0.1,
            ),
            distill=SimpleNamespace(
                kind="hard" if self.teacher else "none", alpha=0.5, temperature=1.0,
                reduction="numel",
            ),
            optimizer=SimpleNamespace(
                name="adamw", lr=1e-3, weight_decay=0.05, b1=0.9, b2=0.999, eps=1e-8,
                momentum=0.9, clip_norm=0.0, decay_dist_token=True, trainable="",
            ),
            schedule=SimpleNamespace(
                epochs=300, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, per_epoch=True
            ),
            train=SimpleNamespace(
                seed=0, loss="cross_entropy", cosub=False, accumulate_steps=1, ema_decay=0.99996
            ),
        )  # fmt: skip

    def image_size(self) -> int:
        """Pixels of a side."""
        return registry.model_options(self.model)["image_size"]

    def examples(self) -> dict[str, np.ndarray]:
        """Random uint8 images [B,H,W,3] and int32 labels [B], the same in every process."""
        rng = np.random.default_rng(0)
        size = self.image_size()
        return {
            "image": rng.integers(0, 256, (self.batch, size, size, 3), np.uint8),
            "label": rng.integers(0, CLASSES, self.batch).astype(np.int32),
        }


class Turn(NamedTuple):
    """Seconds a step took by the clock, and of CPU time on all cores."""

    wall: float
    cpu: float


class Program(NamedTuple):
    """A compiled step. `run(n)` takes n steps and waits for the last one's results."""

    run: Callable[[int], None]
    compile_s: float  # tracing, lowering and compiling
    flops: int  # of a step's matrix products and convolutions, a multiply-add being two
    peak_memory: Callable[[], int]  # bytes on the first device, at most at any time so far

    def turn(self, count: int) -> Turn:
        """Times `count` steps."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.run(count)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Turn(wall / count, cpu / count)


def build(work: Work) -> Program:
    """Compiles the program of `work`, with random weights and images already on the devices.

    Raises:
      InputError: an unknown model, a batch that the devices cannot share, or a student for the
        teacher that has no distillation token.
    """
    if work.batch < 1 or work.batch % (2 * jax.device_count()):
        raise InputError(
            f"--batch is {work.batch}, expected an even number of images for each of the "
            f"{jax.device_count()} device(s)"
        )
    if work.teacher and not registry.is_distilled(work.model):
        raise InputError(f"--distill needs a *_distilled_* model, --model is {work.model}")
    return _train(work) if work.part == "train" else _forward(work)


def _model(
    work: Work, name: str, mesh: jax.sharding.Mesh, **options: Any
) -> tuple[Network, Variables]:
    """A model with random weights on every device."""
    options |= {"num_classes": CLASSES, "dtype": work.dtype}
    network, _ = split_model(registry.abstract_model(name, **options))

    def init(key: jax.Array) -> Variables:
        model = registry.create_model(name, **options, rngs=nnx.Rngs(params=key))
        return split_model(model)[1]

    # Without optimisation, which on CPU takes minutes for these many small kernels that run once.
    fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    start = jax.jit(init, out_shardings=replicated(mesh), compiler_options=fast)
    return network, start(jax.random.key(0))


def _train(work: Work) -> Program:
    """The step of the training loop (`steps.make_train_step`), compiled as the loop does."""
    mesh = make_mesh()
    options = {"drop_path_rate": work.drop_path_rate}
    network, variables = _model(work, work.model, mesh, **options)
    teacher, teacher_variables = None, None
    if work.teacher:
        teacher, teacher_variables = _model(work, work.teacher, mesh)
    config = work.recipe()
    plan = SimpleNamespace(
        num_classes=CLASSES,
        group_size=work.batch // jax.device_count(),
        steps_per_epoch=1251,
        warmup_epochs=5,
    )
    optimizer = optim.make_optimizer(variables.params, config.optimizer)
    everywhere, rows = replicated(mesh), batch_sharding(mesh)
    step = make_train_step(config, plan, network, optimizer, teacher=teacher, replicated=everywhere)
    state = jax.jit(
        lambda variables: new_state(variables, optimizer, ema=work.ema),
        out_shardings=everywhere,
    )(variables)
    batch = jax.device_put(work.examples(), rows)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(everywhere, everywhere, rows),
        out_shardings=(everywhere, everywhere),
    )
    compiled, seconds = _compile(jitted, state, teacher_variables, batch)

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, metrics = compiled(state, teacher_variables, batch)
        jax.block_until_ready((state, metrics))

    # The backward pass has two products for each of the forward pass.
    flops = 3 * forward_flops(network, variables, work)
    if teacher is not None:
        flops += forward_flops(teacher, teacher_variables, work)
    return Program(run, seconds, flops, lambda: _peak_memory(compiled))


def _forward(work: Work) -> Program:
    """From uint8 images to logits; a teacher gets the student's images, normalised already."""
    mesh = make_mesh()
    network, variables = _model(work, work.model, mesh)
    images = work.examples()["image"]
    if work.part == "teacher":
        images = np.asarray(mixing.normalize(images, IMAGENET_MEAN, IMAGENET_STD))

    def forward(variables: Variables, images: jax.Array) -> jax.Array:
        if work.part == "teacher":
            return teacher_forward(network, variables, images, network.info)
        heads, _ = network(variables, mixing.normalize(images, IMAGENET_MEAN, IMAGENET_STD))
        return sum(heads) / len(heads)

    images = jax.device_put(images, batch_sharding(mesh))
    compiled, seconds = _compile(jax.jit(forward), variables, images)

    def run(count: int) -> None:
        for _ in range(count):
            logits = compiled(variables, images)
        jax.block_until_ready(logits)

    flops = forward_flops(network, variables, work)
    return Program(run, seconds, flops, lambda: _peak_memory(compiled))


def _compile(jitted: Any, *arguments: Any) -> tuple[jax.stages.Compiled, float]:
    begin = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    return compiled, time.perf_counter() - begin


def _peak_memory(compiled: jax.stages.Compiled) -> int:
    """What the device measured; where it does not (CPU), what the compiler has planned."""
    measured = jax.local_devices()[0].memory_stats()
    if measured:
        return measured["peak_bytes_in_use"]
    planned = compiled.memory_analysis()
    return (
        planned.argument_size_in_bytes
        + planned.output_size_in_bytes
        - planned.alias_size_in_bytes
        + planned.temp_size_in_bytes
    )


def forward_flops(network: Network, variables: Variables, work: Work) -> int:
    """FLOPs of the products and convolutions of a forward pass of `work`'s batch."""
    size = work.image_size()
    images = jax.ShapeDtypeStruct((work.batch, size, size, 3), jnp.float32)
    return product_flops(jax.make_jaxpr(lambda v, x: network(v, x)[0])(variables, images).jaxpr)


def product_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products and convolutions of a jaxpr, a multiply-add being two."""
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            contracted = parameters["dimension_numbers"][0][0]
            sizes = (equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * math.prod(sizes)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            out_axis = parameters["dimension_numbers"].rhs_spec[0]
            per_output = kernel.size // kernel.shape[out_axis]
            total += 2 * equation.outvars[0].aval.size * per_output
        elif name == "cond":  # one of the branches runs, here the same work for other platforms
            total += max(product_flops(branch.jaxpr) for branch in parameters["branches"])
        else:
            total += sum(product_flops(inner) for inner in _inner_jaxprs(parameters.values()))
    return total


def _inner_jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        inner = getattr(value, "jaxpr", value)  # closed or open
        if hasattr(inner, "eqns"):
            yield inner


def peak_flops() -> float | None:
    """FLOP/s in bfloat16 of all devices together, None where it is not known."""
    chip = chips.find(jax.devices()[0].device_kind)
    return chip.tflops * 1e12 * jax.device_count() if chip else None
