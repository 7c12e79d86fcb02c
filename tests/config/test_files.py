"""Recipes and configs as files: names, paths, run folders, other versions, and the wheel."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest

import deit_jax
from deit_jax.config import files
from deit_jax.config.fields import default_config
from deit_jax.config.files import (
    changed_fields,
    load_config,
    packaged_recipes,
    recorded_fields,
    write_config,
)
from deit_jax.config.validate import validate
from deit_jax.training.teacher import teacher_config
from tests.refusal import refusal


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Any working folder but the clone."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


STUDENT = """
from . import deit3, shared

def get_config(run="s"):
    config = deit3.get_config(run)
    config.distill.teacher_config = shared.TEACHER
    return config
"""
TEACHER = """
import deit_jax

def get_config():
    config = deit_jax.load_config("digits_teacher")
    config.schedule.epochs = 7
    return config
"""


@pytest.fixture
def own_recipes(tmp_path):
    """A student and its teacher in a folder of their own, by means of packaged recipes."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "student.py").write_text(STUDENT)
    (folder / "shared.py").write_text("TEACHER = 'teacher.py'\n")
    (folder / "teacher.py").write_text(TEACHER)
    return folder


@pytest.mark.parametrize("name", ["deit3:l_400", "deit3.py:l_400", "configs/deit3.py:l_400"])
def test_a_packaged_recipe_is_found_from_any_folder(name, repo_root):
    assert deit_jax.load_config is load_config
    config = load_config(name)
    assert (config.model.name, config.schedule.epochs) == ("deit3_large_patch16_224", 400)
    assert load_config(f"{repo_root}/configs/deit3.py:l_400").to_json() == config.to_json()


def test_a_run_folder_and_its_config_are_the_config_again(tmp_path):
    config = load_config("deit3:b")  # with a curve, nested tuples
    config.optimizer.lr = 1  # JSON keeps it whole
    (tmp_path / "digits").mkdir()
    write_config(config, tmp_path / "digits")
    for name in (tmp_path / "digits", "./digits", "digits/config.json"):
        again = load_config(name)
        validate(again)
        assert again.to_dict() == config.to_dict()
    assert load_config("digits").dataset.source == "digits"  # the packaged name wins
    (tmp_path / "empty").mkdir()
    assert "empty is not a run folder" in refusal(load_config, "empty")


def test_a_file_in_the_folder_wins_over_the_packaged_recipe(own_recipes, monkeypatch):
    """A copy of a recipe, changed, and what it imports or names beside it."""
    for name in ("digits.py", "digits_teacher.py"):
        text = packaged_recipes()[name.removesuffix(".py")].read_text()
        (own_recipes / name).write_text(text.replace("epochs = 40", "epochs = 9"))
    copy = own_recipes / "digits_distill.py"
    copy.write_text(packaged_recipes()["digits_distill"].read_text())
    config = load_config(copy)
    assert config.distill.teacher_config == str(own_recipes / "digits_teacher.py")
    assert teacher_config(config).schedule.epochs == 9
    assert teacher_config(load_config("digits_distill")).schedule.epochs == 40
    monkeypatch.chdir(own_recipes)
    assert load_config("digits_teacher.py").schedule.epochs == 9


def test_the_teachers_recipe_is_found_beside_its_students_and_later(own_recipes, tmp_path):
    """Not in the working folder, which has another one; also from the run's config.json."""
    (tmp_path / "teacher.py").write_text("raise AssertionError('not this one')")
    config = load_config("own/student.py:b")
    assert config.model.name == "deit3_base_patch16_224"
    assert config.distill.teacher_config == str(own_recipes / "teacher.py")
    packaged = load_config("digits_distill")
    assert packaged.distill.teacher_config == "digits_teacher"
    for recipe, epochs in ((config, 7), (packaged, 40)):
        write_config(recipe, tmp_path)
        assert teacher_config(load_config(tmp_path / "config.json")).schedule.epochs == epochs
    old = default_config()
    old.distill.teacher_config = "configs/digits_teacher.py"  # of earlier versions
    assert teacher_config(old).schedule.epochs == 40


def test_the_config_of_another_version(tmp_path, capsys):
    tree = json.loads(default_config().to_json())
    file = tmp_path / "config.json"
    tree["parallel"]["backend"] = "mesh"
    del tree["train"]["cosub"], tree["distributed"]
    file.write_text(json.dumps(tree))
    assert load_config(file).to_dict() == default_config().to_dict()
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.cosub = False" in line
    assert "distributed.process_id = 0" in line
    assert changed_fields(default_config(), tmp_path) == ["train.cosub: None → False"]
    tree["train"]["dropout"] = 0.1
    file.write_text(json.dumps(tree))
    assert "train.dropout" in refusal(load_config, file)
    for damaged in ("", '{"train": ', "[]", "[" * 100_000, '{"train": ' * 300 + "1" + "}" * 300):
        file.write_text(damaged)
        assert recorded_fields(str(file.parent)) == {}
        assert f"{file} is damaged" in refusal(load_config, file)
        assert changed_fields(default_config(), tmp_path) == []  # a run resumes all the same
    assert "nowhere/config.json cannot be read" in refusal(load_config, "nowhere/config.json")


def test_changed_fields_lists_what_differs_from_the_first_run(tmp_path):
    config = default_config()
    assert changed_fields(config, tmp_path) == []  # a new run
    write_config(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert changed_fields(default_config(), tmp_path) == []
    config.schedule.epochs = 400
    config.input.scale = (0.1, 1.0)
    config.distributed.process_id = 3
    assert changed_fields(config, tmp_path) == [
        "input.scale: [0.08, 1.0] → [0.1, 1.0]",
        "schedule.epochs: 300 → 400",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", ["did you mean digits", "deit_b_distill", "finetune_transfer", "FILE.py"]),
        ("deit_d_distil", ["did you mean deit_b_distill, deit_distill"]),
        ("runs/deit_b.py", ["runs/deit_b.py", "did you mean deit_b"]),
        ("deit:xl", ["'xl'", "only ti, s, b", "--config=deit:ti"]),
        ("deit:", ["no run ''"]),
        ("digits:b", ["one run only"]),
        ("own/shared.py", ["shared.py defines no get_config"]),
        ("own/broken.py", ["broken.py:2: ZeroDivisionError"]),
        ("own/wrong.py", ["wrong.py", "returns 3"]),
        ("own/README.md", ["own/README.md is not a recipe; expected a FILE.py"]),
        ("own/no_name", ["own/no_name is not a recipe"]),
        ("/dev/null", ["/dev/null is not a recipe"]),
        ("", ["the name of the recipe is empty"]),
    ],
)
def test_recipes_that_are_not_there_or_fail(own_recipes, name, words):
    (own_recipes / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    (own_recipes / "wrong.py").write_text("def get_config():\n    return 3\n")
    (own_recipes / "README.md").write_text("# A run\n")
    (own_recipes / "no_name").write_bytes(b"\0" * 99)
    message = refusal(load_config, name)
    for word in words:
        assert word in message


def test_a_bug_of_ours_is_no_mistake_in_a_recipe(own_recipes, monkeypatch):
    files_code = compile("def upgrade(config):\n    return {}['a bug']\n", files.__file__, "exec")
    exec(files_code, space := {})
    monkeypatch.setattr(files, "upgrade", space["upgrade"])
    with pytest.raises(KeyError, match="a bug"):
        load_config("digits")


@pytest.mark.slow
def test_the_wheel_holds_the_recipes_and_finds_them(repo_root, tmp_path):
    source = tmp_path / "source"  # no build/ of before
    source.mkdir()
    for name in ("deit_jax", "configs"):
        shutil.copytree(repo_root / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, source)
    command = ["pip", "wheel", source, "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("deit_jax-*.whl")
    assert wheel.name.split("-")[1] == deit_jax.__version__
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    recipes = {f"deit_jax/configs/{name}.py" for name in [*packaged_recipes(), "common"]}
    assert recipes | {"deit_jax/py.typed", "deit_jax/models/imagenet_classes.txt"} <= names
    assert not [name for name in names if name.startswith(("tests", "configs", "benchmarks"))]
    program = (
        "import deit_jax; from deit_jax.training.teacher import teacher_config\n"
        "config = deit_jax.load_config('digits_distill')\n"
        "print(deit_jax.__file__, teacher_config(config).model.name)"
    )
    env = {"PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"}
    printed = subprocess.check_output([sys.executable, "-c", program], env=env, text=True)
    assert printed.split() == [f"{tmp_path}/installed/deit_jax/__init__.py", "regnety_testing"]
