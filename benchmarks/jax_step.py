"""Our side of the step benchmark: what a run compiles, with random images and weights.

Needs neither a data set nor TensorFlow.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from benchmarks.turns import Program
from deit_jax.config.fields import default_config
from deit_jax.config.plan import plan_run
from deit_jax.config.validate import validate
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.info import IMAGENET_MEAN, IMAGENET_STD
from deit_jax.models.network import Network, Variables, split_model
from deit_jax.parallel import cpu_memory
from deit_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from deit_jax.planning import chips, markdown
from deit_jax.planning.forecast import abstract_step
from deit_jax.training import mixing
from deit_jax.training.run import build_model
from deit_jax.training.setup import assemble, check_model
from deit_jax.training.state import new_state
from deit_jax.training.teacher import for_devices, teacher_forward

CLASSES = 1000


class Work(NamedTuple):
    """What is timed: `part` is train, infer or teacher; `batch` images of all devices a step."""

    part: str
    model: str
    batch: int
    dtype: str
    teacher: str = ""  # training with hard distillation from this model; "": no distillation
    ema: bool = False
    attention: str = "auto"  # training: how ours computes it, as in the recipe

    def recipe(self) -> ConfigDict:
        """Returns DeiT-B's recipe for the model, with one group of mixing per device."""
        config, options = default_config(), registry.model_options(self.model)
        config.model.name = self.model
        if registry.family(self.model) == "regnet":
            config.model.drop_path_rate = 0.0  # RegNets have no stochastic depth
        config.input.image_size = options["image_size"]
        config.mixing.group_size = self.batch
        config.model.attention = self.attention
        config.distill.kind = "hard" if self.teacher else "none"
        config.train.batch_size = self.batch
        config.train.dtype = self.dtype
        if not self.ema:
            config.train.ema_decay = 0.0
        return config

    def examples(self) -> dict[str, np.ndarray]:
        """Returns random uint8 images [B,H,W,3] and int32 labels [B], always the same."""
        rng = np.random.default_rng(0)
        size = registry.model_options(self.model)["image_size"]
        return {
            "image": rng.integers(0, 256, (self.batch, size, size, 3), np.uint8),
            "label": rng.integers(0, CLASSES, self.batch).astype(np.int32),
        }


def build(work: Work, profile: str | None) -> Program:
    """Compiles the program of `work` for all devices.

    Args:
      work: what is timed.
      profile: folder for a profile of three steps, or None.

    Raises:
      InputError: an unknown model, a batch that the devices cannot share, or a student for the
        teacher that has no distillation token.
    """
    cpu_memory.keep_memory()  # as the training loop does
    count = jax.device_count()
    if work.batch % (2 * count):
        raise InputError(
            f"--batch is {work.batch}, expected an even number of images for each of the {count} "
            "device(s)"
        )
    jitted, arguments = train(work) if work.part == "train" else _forward(work)
    begin = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - begin

    def run(count: int) -> None:
        nonlocal arguments
        for _ in range(count):
            result = compiled(*arguments)
            if work.part == "train":  # it has consumed the state
                arguments = (result[0], *arguments[1:])
        jax.block_until_ready(result)

    def peak_memory() -> int:
        measured = jax.local_devices()[0].memory_stats()  # None on CPU
        if measured:
            return measured["peak_bytes_in_use"]
        plan = compiled.memory_analysis()
        kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return kept + plan.temp_size_in_bytes

    if profile:
        run(1)
        with jax.profiler.trace(profile):
            run(3)
    flops = forward_flops(work, work.model)
    if work.part == "train":  # the backward pass has two matmuls for each of the forward pass
        flops = 3 * flops + (forward_flops(work, work.teacher) if work.teacher else 0)
    device = jax.devices()[0]
    chip = chips.find(device.device_kind)
    kind = markdown.processor() if device.platform == "cpu" else device.device_kind
    facts = {
        "compile_s": seconds,
        "flops": flops,
        "platform": device.platform,
        "devices": count,
        "device": f"{count} × {kind}",
        "peak_flops": chip.tflops * 1e12 * count if chip else None,
    }
    return Program(run, facts, peak_memory)


def train(work: Work) -> tuple[Any, tuple]:
    """Returns a run's step and its arguments: state, teacher's weights, uint8 images and labels."""
    config = work.recipe()
    validate(config)
    check_model(config, jax.default_backend())
    counts = {"num_train": 1_281_167, "num_classes": CLASSES, "num_devices": jax.device_count()}
    plan = plan_run(config, **counts)
    run = assemble(config, "", plan, make_mesh())
    student = split_model(build_model(config, plan, rngs=nnx.Rngs(0)))[1]
    teacher = (None, None)
    if work.teacher:
        teacher = for_devices(run.mesh, *_network(work, work.teacher))
    step, shapes = abstract_step(run, *teacher)
    arguments = new_state(student, run.optimizer, ema=work.ema), teacher[1], work.examples()
    return step, jax.device_put(arguments, jax.tree.map(lambda x: x.sharding, shapes))


def _forward(work: Work) -> tuple[Any, tuple]:
    """The forward pass, from weights and uint8 images to logits.

    A teacher gets the student's images, which are normalised already.
    """
    mesh = make_mesh()
    network, variables = _network(work, work.model)
    images = work.examples()["image"]
    if work.part == "teacher":
        network, variables = for_devices(mesh, network, variables)
        images = mixing.normalize(images, IMAGENET_MEAN, IMAGENET_STD)

    def forward(variables: Variables, images: jax.Array) -> jax.Array:
        if work.part == "infer":
            images = mixing.normalize(images, IMAGENET_MEAN, IMAGENET_STD)
        return teacher_forward(network, variables, images, network.info)

    shardings = (replicated(mesh), batch_sharding(mesh))
    return jax.jit(forward), jax.device_put((variables, images), shardings)


def _network(work: Work, name: str) -> tuple[Network, Variables]:
    options = {"num_classes": CLASSES, "dtype": work.dtype, "rngs": nnx.Rngs(0)}
    return split_model(registry.create_model(name, **options))


def forward_flops(work: Work, name: str) -> float:
    """Returns the FLOPs of a forward pass of `work`'s batch through a model, as XLA counts them.

    Lowered for the CPU on every device: XLA cannot count what happens in a hand-written kernel.
    """
    model = registry.abstract_model(name, num_classes=CLASSES, dtype=work.dtype)
    network, variables = split_model(model)
    images = jax.ShapeDtypeStruct(work.examples()["image"].shape, jnp.float32)
    traced = jax.jit(lambda variables, x: network(variables, x)[0]).trace(variables, images)
    return traced.lower(lowering_platforms=("cpu",)).cost_analysis()["flops"]
