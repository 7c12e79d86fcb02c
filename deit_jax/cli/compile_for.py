"""Compiles a recipe's training step for a TPU slice that is not here, and says what it needs.

python tools/compile_for.py --config=configs/deit_b_distill.py --topology v5e:4x4
python tools/compile_for.py --config=configs/deit3.py:h --topology v5e:4x8 \\
    --config.parallel.fsdp=32 --config.model.remat=True --write docs/tpu.md

The step is the training loop's own, on the recipe's model, teacher, state and mesh, compiled by
the TPU compiler, which needs no TPU: pip install 'jax[tpu]'. It takes minutes. No data is read.

Memory and exchanges are those of the compiled program. Times are estimates from the rates that the
chip's maker states: arithmetic at the bfloat16 peak; the compiler's count of the bytes that
operations read and write, part of which never leaves the chip, at the memory's rate; exchanges one
after the other, each as one ring over its devices on the links of one axis of the torus.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Before JAX starts: no TPU of this machine is used, and none is looked for in a cloud's metadata.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

from deit_jax.config.flags import Parser, parse
from deit_jax.errors import InputError, brief, exit_status
from deit_jax.planning import reports

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
IMAGENET = {"train_images": 1_281_167, "classes": 1000}


def main(argv: list[str] | None = None) -> int:
    """Compiles and prints; returns the exit status, 0 also where the step does not fit."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    arguments = _parse(argv)
    devices = _topology(arguments.topology)
    from deit_jax.planning import chips, forecast

    chip = chips.find(devices[0].device_kind)
    limit = int(chip.memory * forecast.GIB) if chip else None
    setup = _setup(arguments, devices)
    report = forecast.forecast(setup, limit=limit, teacher=arguments.teacher)
    report |= {
        "config": arguments.config_file,
        "topology": arguments.topology,
        "date": str(datetime.date.today()),
        "versions": {"python": platform.python_version(), **reports.versions(PACKAGES)},
    }
    section = list(markdown(report, f"{_flags()}python tools/compile_for.py {shlex.join(argv)}"))
    if arguments.json:
        rows = [one._asdict() for one in report["collectives"]]
        print(json.dumps(report | {"collectives": rows}, indent=2))
    else:
        print("\n".join(section))
    if arguments.write:
        from deit_jax.planning.reports import write_section

        write_section(arguments.write, section)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--topology", required=True, metavar="KIND:SHAPE", help="v5e:4x4, v6e:4x4, v4:2x2x4, ...")
    add("--teacher", default="regnety_160", metavar="NAME", help="where the recipe names none")
    add("--classes", type=int, default=IMAGENET["classes"], help="(default: 1000)")
    add("--train-images", type=int, default=IMAGENET["train_images"], help="(default: 1281167)")
    add("--json", action="store_true", help="print the report for programs")
    add("--write", type=Path, metavar="FILE", help="also put the section into this Markdown file")
    arguments = parse(parser, argv)
    if arguments.config is None:
        raise InputError("--config is missing; name a recipe, as in --config=configs/deit_b.py")
    for name in ("classes", "train_images"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {getattr(arguments, name)}, expected 1 or more")
    file = arguments.write
    # A place that cannot be written shows now, not after minutes.
    if file and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise InputError(f"--write {file}: cannot be written; name a file in a folder that can")
    return arguments


def _topology(name: str) -> list:
    """The devices of a slice, described by the TPU compiler."""
    if find_spec("libtpu") is None:
        raise InputError(
            f"--topology {name} needs the TPU compiler, which is not installed: "
            f"pip install 'jax[tpu]=={version('jax')}'"
        )
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # jaxlib and libtpu raise what they like
        raise InputError(
            f"--topology {name}: the TPU compiler knows no such slice ({brief(error)}); expected "
            "KIND:SHAPE, such as v5e:4x4, v6e:4x4 or v4:2x2x4"
        ) from error


def _setup(arguments: argparse.Namespace, devices: list) -> object:
    from deit_jax.config.plan import check_batch, plan_run
    from deit_jax.config.validate import validate
    from deit_jax.models import registry
    from deit_jax.parallel.mesh import make_mesh
    from deit_jax.training.setup import assemble, check_model

    config = arguments.config
    validate(config)
    hosts = len({device.process_index for device in devices})
    check_batch(config, num_devices=len(devices), num_processes=hosts)
    check_model(config)
    registry.model_options(arguments.teacher)  # InputError for an unknown name
    plan = plan_run(
        config,
        num_train=arguments.train_images,
        num_eval=0,
        num_classes=arguments.classes,
        class_names=(),
        num_devices=len(devices),
    )
    mesh = make_mesh(config.parallel.fsdp, devices)
    return assemble(config, "", plan, mesh)


def _flags() -> str:
    """The flags that the TPU compiler takes from the environment, as a shell would set them."""
    flags = os.environ.get("LIBTPU_INIT_ARGS")
    return f"LIBTPU_INIT_ARGS={shlex.quote(flags)} " if flags else ""


def markdown(report: dict, command: str) -> Iterator[str]:
    """The lines of the report's section; the first is its heading."""
    from deit_jax.planning import forecast

    fsdp = report["mesh"]["fsdp"]
    ways = [f"fsdp {fsdp}"] if fsdp > 1 else []
    ways += ["remat"] if report["remat"] else []
    if report["accumulate_steps"] > 1:
        ways.append(f"{report['accumulate_steps']} micro-batches")
    ways += ["the compiler's flags below"] if _flags() else []
    how = f", with {', '.join(ways)}" if ways else ""
    yield f"## {report['model']}, {report['batch']} images, on {report['topology']}{how}"
    yield ""
    yield f"`{command}`"
    yield ""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    yield f"{report['date']}; {versions}."
    yield ""
    yield from forecast.lines(report)


if __name__ == "__main__":
    sys.exit(main())
