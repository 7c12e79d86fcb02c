"""Trains and restores runs, step by step, over the devices of this process; prints JSON.

python -m tests.device_check shard ROOT               one recipe over three meshes
python -m tests.device_check pmap ROOT                the same over the mesh and under pmap
python -m tests.device_check kernels ROOT             TPU kernels, interpreted, over them
python -m tests.device_check collectives ROOT         how many there are in the compiled step
python -m tests.device_check restore ROOT NAME FSDP [COORDINATOR PROCESS_ID]
                                                      what is in the checkpoint of ROOT/NAME
"""

import collections
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from configs import digits_distill
from deit_jax import data, trees
from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.models import attention, norms, registry
from deit_jax.parallel import axis
from deit_jax.parallel.mesh import batch_sharding, to_global, to_host
from deit_jax.planning.collectives import read
from deit_jax.training import loop, summary
from deit_jax.training.setup import check, initial_state
from deit_jax.training.teacher import load_teacher
from tests import small_main

_NO_BEST = {"top1": -1.0, "step": -1}


def recipe(root: Path, *, backend: str = "jit", fsdp: int = 1, parts: int = 1) -> ConfigDict:
    """Distillation with everything on that is drawn, or that sums over all parameters."""
    config = digits_distill.get_config()
    config.model.drop_path_rate = 0.1
    config.mixing.random_erasing = 0.25
    config.mixing.cutmix_alpha = 1.0
    config.optimizer.name = "lamb"
    config.optimizer.clip_norm = 1.0
    config.schedule.warmup_lr = 1e-3
    config.distill.teacher = str(root / "teacher")
    config.parallel.backend, config.parallel.fsdp = backend, fsdp
    config.train.accumulate_steps = parts
    return config


def make_small(root: Path) -> None:
    """Smaller models, as these programs are compiled more than they run; a teacher."""
    registry._MODELS = small_main.models()
    if not (root / "teacher").exists():
        options = {"num_classes": 10, "patch_size": 16, "depth": 1}
        model = registry.create_model("deit_testing", **options, rngs=nnx.Rngs(1))
        model_folder.save_model(root / "teacher", model)


class Run:
    """A run whose steps are taken by hand, from the latest checkpoint of its folder."""

    def __init__(self, config: ConfigDict, workdir: Path):
        self.setup = check(config, str(workdir))
        self.checkpoints = TrainCheckpoints(str(workdir), keep=9)
        self.state, shardings, _, origin = initial_state(self.setup, self.checkpoints)
        self.summary = summary.describe_run(self.setup, origin)
        source, plan = self.setup.train_source, self.setup.input_plan()
        self._batches = data.train_batches(source, plan, start_step=int(self.state.step))
        teacher, self._teacher = load_teacher(self.setup)
        self._step = loop.jit_train_step(self.setup, shardings, teacher)

    def next_batch(self) -> dict[str, jax.Array]:
        """The global batch that comes next, on the devices."""
        return to_global(next(self._batches), batch_sharding(self.setup.mesh))

    def losses(self, count: int) -> list[float]:
        """Trains so many steps."""
        found = []
        for _ in range(count):
            self.state, metrics = self._step(self.state, self._teacher, self.next_batch())
            found.append(float(metrics["loss"]))
        return found

    def save(self, workdir: Path) -> None:
        """Adds the state to the checkpoints of a folder."""
        with contextlib.closing(TrainCheckpoints(str(workdir), keep=9)) as checkpoints:
            info, step = self.setup.network.info, int(self.state.step)
            checkpoints.save(self.state, info, step=step, best=_NO_BEST)

    def arrays(self) -> dict[str, jax.Array]:
        """The state's arrays by name, without its counters."""
        return trees.flat([self.state.model, self.state.opt_state, self.state.ema])

    def device_bytes(self) -> list[int]:
        """What the arrays take on each device of this process."""
        sizes = dict.fromkeys(jax.local_devices(), 0)
        for array in self.arrays().values():
            for shard in array.addressable_shards:
                sizes[shard.device] += shard.data.nbytes
        return list(sizes.values())


@contextlib.contextmanager
def opened(config: ConfigDict, workdir: Path) -> Iterator[Run]:
    """A run, closed at the end."""
    run = Run(config, workdir)
    with contextlib.closing(run.checkpoints):
        yield run


def digest(tree: object) -> str:
    """A hash of all bits of arrays on the devices, whichever way they lie there."""
    flat = sorted(trees.flat(to_host(tree)).items())
    return trees.digest(*itertools.chain.from_iterable(flat))


def shard(root: Path) -> dict:
    """Six steps over 8 × 1 and 1 × 8; the first, saved after three, goes on over 2 × 4."""
    found = {"losses": {}, "bytes": {}, "summary": {}}
    for fsdp in (1, 8, 4):
        workdir = root / ("saved" if fsdp == 4 else f"fsdp{fsdp}")
        with opened(recipe(root, fsdp=fsdp), workdir) as run:
            found["bytes"][fsdp], found["summary"][fsdp] = run.device_bytes(), run.summary
            if fsdp == 4:
                found["restored"], found["losses"][fsdp] = digest(run.state), run.losses(3)
                continue
            found["losses"][fsdp] = run.losses(3)
            if fsdp == 1:
                found["arrays"] = {name: x.nbytes for name, x in run.arrays().items()}
                found["state"] = digest(run.state)
                run.save(root / "saved")
            found["losses"][fsdp] += run.losses(3)
    return found


def restore(root: Path, name: str, fsdp: str, *process: str) -> dict:
    """The state of ROOT/NAME and three steps; two processes save it again as ROOT/by_two."""
    config = recipe(root, fsdp=int(fsdp))
    if process:
        config.distributed.coordinator_address, config.distributed.num_processes = process[0], 2
        config.distributed.process_id = int(process[1])
    with opened(config, root / name) as run:
        found = {"state": digest(run.state), "summary": run.summary}
        if process:
            run.save(root / "by_two")
        return found | {"losses": run.losses(3)}


def pmap(root: Path) -> dict:
    """Twenty steps of each backend, saved after ten and gone on with by the other."""
    found = {"losses": {}, "continued": {}, "summary": {}}
    for backend in ("jit", "pmap"):
        with opened(recipe(root, backend=backend, parts=2), root / backend) as run:
            found["summary"][backend] = run.summary
            found["losses"][backend] = run.losses(10)
            run.save(root / backend)
            found["losses"][backend] += run.losses(1)
            before = jax.tree.leaves(run.state)  # which no save holds on to
            found["losses"][backend] += run.losses(9)
            found["donated"] = all(x.is_deleted() for x in before)
    for backend, other in (("jit", "pmap"), ("pmap", "jit")):
        with opened(recipe(root, backend=backend, parts=2), root / other) as run:
            found["continued"][backend] = run.losses(10)
    return found | {"batch_norm": batch_norm()}


def kernels(root: Path) -> dict:
    """Three steps in bfloat16 with attention by XLA, by kernels over a mesh, and under pmap."""
    found = {}
    choose = attention.choose
    for name, options in {"xla": {}, "mesh": {"fsdp": 4}, "pmap": {"backend": "pmap"}}.items():
        config = recipe(root, parts=2, **options)
        config.train.dtype = "bfloat16"
        attention.choose = choose if name == "xla" else lambda *_: "pallas"
        with opened(config, root / name) as run:
            found[name] = run.losses(3)
    return found


def collectives(root: Path) -> dict:
    """The collective operations in the optimised HLO of the step over 8 × 1 and 1 × 8, by kind."""
    found = {}
    for fsdp in (1, 8):
        with opened(recipe(root, fsdp=fsdp), root / f"collectives{fsdp}") as run:
            step = run._step.lower(run.state, run._teacher, run.next_batch()).compile()
        kinds = (one.kind for one in read(step.as_text(), jax.device_count()))
        found[fsdp] = collections.Counter(kinds)
    return found


def batch_norm() -> float:
    """The largest relative error of BatchNorm under pmap: output, gradient and statistics."""
    devices = jax.device_count()
    images = jax.random.normal(jax.random.key(0), (devices, 2, 4, 4, 3)) * 3.0
    images += jnp.arange(float(devices)).reshape(-1, 1, 1, 1, 1)  # no share is like the batch
    weights = jax.random.normal(jax.random.key(1), images.shape)

    def run(x: jax.Array, weights: jax.Array) -> tuple:
        norm = norms.BatchNorm(3)
        out = norm(x, nnx.Rngs(dropout=jax.random.key(0)))
        return (out * weights).sum(), (norm.mean[...], norm.var[...])

    def one(x: jax.Array, weights: jax.Array) -> tuple:
        (out, after), grad = jax.value_and_grad(run, has_aux=True)(x, weights)
        return out, grad, *after

    flat = [x.reshape(-1, 4, 4, 3) for x in (images, weights)]
    out, grad, *after = jax.jit(one)(*flat)
    found, found_grad, *found_after = jax.pmap(one, axis_name=axis.NAME)(images, weights)
    pairs = [(found.sum(), out), (found_grad.reshape(grad.shape), grad)]
    pairs += [(x[-1], y) for x, y in zip(found_after, after, strict=True)]
    return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)


if __name__ == "__main__":
    mode, root, *rest = sys.argv[1:]
    make_small(Path(root))
    modes = {one.__name__: one for one in (shard, pmap, kernels, collectives, restore)}
    print(json.dumps(modes[mode](Path(root), *rest)))
