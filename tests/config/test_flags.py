"""The command line of a config: overrides, guesses, and --workdir alone."""

import pytest

from deit_jax.cli.arguments import Parser
from deit_jax.config.files import write_config
from deit_jax.config.flags import parse
from deit_jax.config.validate import validate
from tests.refusal import refusal


def _parse(*argv):
    parser = Parser("A tool.\n\nexample\n\nnotes")
    parser.add_argument("--workdir")
    parser.add_argument("--count", type=int)
    return parse(parser, list(argv))


def _refusal(*argv):
    return refusal(lambda: validate(_parse(*argv).config))


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("--config.optimizer.lr=1", "optimizer.lr", 1.0),
        ("--config.optimizer.weight-decay=.1", "optimizer.weight_decay", 0.1),
        ("-config.schedule.epochs 3", "schedule.epochs", 3),
        ("--config.input.scale=(0.5,1)", "input.scale", (0.5, 1)),
        ("--config.train.expected_top1=[(1,2.5)]", "train.expected_top1", ((1, 2.5),)),
        ("--config.train.cosub", "train.cosub", True),
        ("--noconfig.optimizer.decay_dist_token", "optimizer.decay_dist_token", False),
        ("--config.dataset.name=", "dataset.name", ""),
        ("--config.init_from=a=b", "init_from", "a=b"),
        ("--config.model=deit_testing", "model.name", "deit_testing"),
        ("--config.parallel.backend=mesh", "parallel.backend", "jit"),
        ("--config.distill.teacher_config=digits.py", "distill.teacher_config", "digits"),
    ],
)
def test_overrides_have_the_type_of_their_field(flag, field, value, capsys):
    arguments = _parse("--count=2", *flag.split(), "--config", "deit:ti")  # in any order
    assert (arguments.count, arguments.config_file) == (2, "deit:ti")
    group, _, name = field.rpartition(".")
    found = (arguments.config[group] if group else arguments.config)[name]
    assert (found, type(found)) == (value, type(value))
    assert ("config.model.name=deit_testing" in capsys.readouterr().err) == ("model=" in flag)
    with pytest.raises(AttributeError):
        arguments.config.lr = 1  # locked


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("lr=1e-3", "did you mean --config.optimizer.lr?"),
        ("optimizer.lrr=1e-3", "--config.optimizer.lr?"),
        ("train.batchsize=8", "--config.train.batch_size?"),
        ("img_size=384", "--config.input.image_size?"),
        ("name=x", "--config.dataset.name, --config.model.name or --config.optimizer.name?"),
        ("shedule.epochs=3", "--config.schedule.epochs?"),
        ("workers=8", "all cores"),
        ("output_dir=x", "--workdir"),
        ("optimizer=lamb", "--config.optimizer.name=lamb?"),
        ("model={'name': 'x'}", "config.model is a group of fields"),
        ("model.foo=1", "config.model has attention, drop_path_rate, name"),
        ("foo=1", "the groups of fields are checkpoint, dataset"),
        ("optimizer.lr=fast", "config.optimizer.lr is 'fast', but must be a number"),
        ("train.cosub=maybe", "config.train.cosub is 'maybe', but must be True or False"),
        ("input.scale=384", "config.input.scale is 384, but must be 2 numbers"),
        ("input.scale=(1", "config.input.scale is '(1', but must be numbers in brackets"),
        ("optimizer.name=adam", "config.optimizer.name is 'adam', but must be one of adamw"),
        ("optimizer.lr", "--config.optimizer.lr lacks its value"),
    ],
)
def test_a_wrong_or_guessed_field_gets_the_answer(flag, answer):
    assert answer in _refusal("--config=deit", f"--config.{flag}")


def test_the_run_in_the_workdir_is_enough(tmp_path):
    workdir = f"--workdir={tmp_path}"
    assert "--config is missing" in _refusal(workdir)
    assert "--config is missing" in _refusal("--config.optimizer.lr=1")
    assert "unexpected argument 'stray'" in _refusal("--config=deit", "stray")
    assert "--noconfig.optimizer.lr" in _refusal("--config=deit", "--noconfig.optimizer.lr=1")
    assert _parse("--count=1").config is None  # for tools that can do without
    first = _parse("--config=digits", "--config.schedule.epochs=2").config
    write_config(first, tmp_path)
    assert _parse(workdir).config.to_dict() == first.to_dict()
    longer = _parse(workdir, "--config.schedule.epochs=9").config
    assert (longer.schedule.epochs, longer.dataset.source) == (9, "digits")
    other = _parse(workdir, "--config=deit").config
    assert other.dataset.source == "tfds"  # what is named wins
