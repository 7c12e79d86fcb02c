"""The study of distillation: its images, its comparison, and all of it on a toy."""

import json

import numpy as np
import pytest
from PIL import Image

from deit_jax.config.files import load_config
from deit_jax.errors import InputError
from experiments import cells, distillation

CLASSES = ("cat", "dog")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of grey, one darker, 250 images each; val is what is held out of train."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
        for i in range(250):
            image = Image.fromarray(rng.integers(0, 150 + 50 * number, (32, 32, 3), np.uint8))
            for split in ("train", "val")[: 1 + (i >= 245)]:
                image.save(root / split / name / f"{i:04}.png")
    return root


def test_parts_are_balanced_nested_and_never_held_out(data, tmp_path):
    names = {}
    for fraction, seed in ((0.1, 0), (0.3, 0), (0.3, 1), (1.0, 0)):
        at = distillation.link_images(data, tmp_path / f"{fraction}{seed}", fraction, seed)
        for split in ("train", "val"):
            each = [{f.name for f in (at / split / name).iterdir()} for name in CLASSES]
            names[fraction, seed, split] = each
        held_out = {f"{i:04}.png" for i in range(245, 250)}
        assert names[fraction, seed, "val"] == [held_out, held_out]
        assert all(not held_out & each for each in names[fraction, seed, "train"])
        assert {len(each) for each in names[fraction, seed, "train"]} == {
            min(245, round(250 * fraction))
        }
    for small, large in zip(names[0.1, 0, "train"], names[0.3, 0, "train"], strict=True):
        assert small < large
    assert names[0.3, 0, "train"] != names[0.3, 1, "train"]
    assert names[0.3, 0, "train"][0] != names[0.3, 0, "train"][1], "drawn for each class"
    assert (at / "train" / "cat" / "0000.png").read_bytes()
    with pytest.raises(InputError, match=r"holds 0\d\d\d.png, which is not of this part"):
        distillation.link_images(data, at, 0.1, 0)
    with pytest.raises(InputError, match="holds no train/CLASS"):
        distillation.link_images(tmp_path / "none", tmp_path / "x", 0.1, 0)


def cell(run, seed, top1, **more):
    return {"run": run, "images": 500, "seed": seed, "fields": {}, "top1": top1} | more


def test_the_comparison_is_by_seed():
    found = [cell("plain", seed, top1) for seed, top1 in enumerate((30.0, 32.0, 34.0))]
    heads = {"top1_cls": 31.0, "top1_dist": 33.0, "agreement": 50.0}
    found += [cell("hard", seed, top1, **heads) for seed, top1 in enumerate((31.0, 35.0, 36.0))]
    found += [cell("soft", 1, 32.5)]
    rows = list(distillation.lines(found))[2:]
    assert rows == [
        # sd 2 of 3 seeds: 1.15; differences 1, 3, 2: mean 2, sd 1, error 0.577
        "| 500 | plain | 3 | 32.00 ± 1.15 |  |  |  |  |  |",
        "| 500 | hard | 3 | 34.00 ± 1.53 | 31.0 | 33.0 | 50.0 | 2.00 ± 0.58 | +3.5 |",
        "| 500 | soft | 1 | 32.50 |  |  |  | 0.50 |  |",
    ]
    found += [cell(run, 0, top1, over="bare") for run, top1 in (("bare", 20.0), ("taught", 21.5))]
    assert list(distillation.lines(found))[-2:] == [
        "| 500 | bare | 1 | 20.00 |  |  |  |  |  |",
        "| 500 | taught | 1 | 21.50 |  |  |  | 1.50 (over bare) |  |",
    ]


def test_results_keep_what_is_there_and_do_not_mix_settings(data, tmp_path):
    results = tmp_path / "results.json"
    for each in (cell("plain", 0, 1.0), cell("plain", 1, 2.0), cell("plain", 0, 3.0)):
        distillation._keep(each, results)
    assert [c["top1"] for c in json.loads(results.read_text())] == [3.0, 2.0]
    part = {"fraction": 1.0, "seeds": [2], "runs": ["plain"], "fields": {"train.batch_size": 7}}
    kept = [cell("plain", 0, 1.0) | {"images": 490}]
    with pytest.raises(InputError, match="hold plain on 490 images with the fields"):
        next(distillation.train([part], data, tmp_path, held_out=False, kept=kept))


def test_a_cell_is_measured_once_and_not_with_other_fields(tmp_path):
    from deit_jax.config.files import write_config

    config, made = load_config("cifar10:plain"), []

    def measure():
        write_config(config, str(tmp_path / "run"))
        made.append(1)
        return {"top1": 50.0}

    for _ in range(2):
        assert cells.report(config, tmp_path / "run", measure) == {"top1": 50.0}
    assert made == [1]
    config.schedule.epochs += 1
    with pytest.raises(InputError, match=r"holds another run \(schedule.epochs: "):
        cells.report(config, tmp_path / "run", measure)


def test_the_table_lists_runs_of_the_recipe():
    for name in ("distillation", "distillation_quick"):
        parts = distillation.read_table(name)
        for part in parts:
            for run in ("teacher", *part["runs"]):
                distillation.recipe(part, run, 0, distillation.TABLES)


def test_a_run_may_have_another_recipe_and_teacher(data, tmp_path, monkeypatch):
    """Its teacher is made again where it is missing, also if its cell is kept."""
    part = {"fraction": 1.0, "seeds": [0], "runs": ["plain", "larger", "hard_larger"]}
    part["larger"] = {"recipe": "plain", "model.options": "depth=6"}
    part["hard_larger"] = {"recipe": "hard", "teacher": "larger", "over": "larger"}
    config = distillation.recipe(part, "hard_larger", 0, tmp_path)
    assert config.distill.kind == "hard"
    assert config.distill.teacher == str(tmp_path / "larger")
    assert distillation.recipe(part, "larger", 0, tmp_path).model.options == "depth=6"
    monkeypatch.setattr(distillation.cells, "report", lambda config, at, measure: {})
    monkeypatch.setattr(distillation, "score", lambda config, at, test: {"top1": 1.0})
    kept = [{"run": r, "images": 490, "seed": 0, "fields": {}} for r in ("teacher", "plain")]
    kept += [kept[0] | {"run": "larger", "fields": {"model.options": "depth=6"}}]
    made = list(distillation.train([part], data, tmp_path, held_out=False, kept=kept))
    assert [cell["run"] for cell in made] == ["larger", "hard_larger"]
    assert made[1]["over"] == "larger"
    assert made[1]["fields"] == {}
    kept += [kept[0] | {"run": "hard_larger"}]
    more = part | {"runs": [*part["runs"], "again"], "again": part["larger"]}
    made = list(distillation.train([more], data, tmp_path, held_out=False, kept=kept))
    assert [cell["run"] for cell in made] == ["again"], "no teacher for what is not taught"
    for wrong, words in (({"teacher": "none"}, "its teacher, none"), ({"over": "none"}, "is over")):
        table = part | {"hard_larger": part["hard_larger"] | wrong}
        with pytest.raises(InputError, match=words):
            next(distillation.train([table], data, tmp_path, held_out=False, kept=[]))


def test_a_page_without_place_for_the_table_is_refused_first(tmp_path, capsys):
    (tmp_path / "experiments.md").write_text("# Mine", encoding="utf-8")
    flags = ["--quick", f"--data={tmp_path}", f"--workdir={tmp_path}/runs", f"--out={tmp_path}"]
    assert distillation.main(flags) == 2
    assert "<!-- distillation_quick -->" in capsys.readouterr().err


@pytest.mark.slow
def test_quick(data, tmp_path, monkeypatch, capsys):
    """All of the study; what it predicts of the held-out images is what the run found of them."""
    flags = ["--quick", f"--out={tmp_path}"]
    training = [f"--data={data}", f"--workdir={tmp_path / 'runs'}"]
    assert distillation.main(flags + training) == 0
    results = tmp_path / "results" / "distillation_quick.json"
    found = json.loads(results.read_text())
    assert [c["run"] for c in found] == ["teacher", "plain", "hard"] * 2
    for each in found:
        assert each["top1"] == pytest.approx(each["held_out"])
        assert each["images"] == 50
    student = tmp_path / "runs" / "fraction0.1" / "seed1" / "hard"
    predicted = [
        json.loads((student.parent / run / "predictions.json").read_text())
        for run in ("teacher", "hard")
    ]
    same = [a == b for a, b in zip(*(each["mean"] for each in predicted), strict=True)]
    assert found[-1]["agreement"] == pytest.approx(100 * sum(same) / 10)
    assert {"class", "distillation"} < predicted[1].keys()
    page, figure = tmp_path / "experiments.md", results.with_suffix(".svg")
    assert "| 50 | hard | 2 |" in page.read_text()
    first = page.read_bytes(), figure.read_bytes(), results.read_bytes()
    monkeypatch.delattr(distillation.loop, "train")  # nothing is trained again
    assert distillation.main(flags + training) == distillation.main(flags) == 0
    assert (page.read_bytes(), figure.read_bytes(), results.read_bytes()) == first
    assert (student / "config.json").exists()
