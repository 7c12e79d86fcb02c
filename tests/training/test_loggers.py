"""TensorBoard's and wandb's pictures and texts: what is written is what the run sees."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deit_jax
from deit_jax import data
from deit_jax.cli import show_batch
from deit_jax.config.files import load_config
from deit_jax.errors import InputError
from deit_jax.training import showcase
from deit_jax.training.metrics import MetricWriter

SHEET = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


class FakeWandb:
    """As much of wandb as is used; keeps what it is told."""

    def __init__(self):
        self.begun, self.logged, self.config, self.finished = [], [], {}, 0
        self.Image = lambda picture: ("image", picture.size)

    def init(self, **how):
        self.begun.append(how)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)),
            config=SimpleNamespace(update=lambda new, **_: self.config.update(new)),
            finish=self.finish,
        )

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_all_and_a_run_goes_on_in_its_own(tmp_path, wandb):
    for step in (1, 2):
        writer = MetricWriter(str(tmp_path), resume_step=step - 1, wandb="mine")
        assert writer.draws
        writer.text(step, "config", "{}")
        writer.write(step, "train", {"loss": 0.5})
        writer.picture(step, "eval/images", SHEET)
        writer.close()
    assert wandb.logged == [
        (1, {"train/loss": 0.5}),
        (1, {"eval/images": ("image", (4, 4))}),
        (2, {"train/loss": 0.5}),
        (2, {"eval/images": ("image", (4, 4))}),
    ]
    first, second = wandb.begun
    assert first == second
    assert (first["project"], first["resume"], wandb.finished) == ("mine", "allow", 2)
    assert wandb.config == {"config": "{}"}


def test_wandb_that_does_not_start_is_one_line(tmp_path, wandb):
    def init(**_):
        raise RuntimeError("no\nAPI key")

    wandb.init = init
    with pytest.raises(InputError, match=r"^config.train.wandb is 'mine', .*\(no API key\).*login"):
        MetricWriter(str(tmp_path), wandb="mine")


def test_a_writer_without_loggers_draws_nothing(tmp_path):
    writer = MetricWriter(str(tmp_path))
    assert not writer.draws
    writer.picture(0, "eval/images", SHEET)
    writer.close()


def _events(workdir):
    events = EventAccumulator(str(workdir), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.mark.slow
def test_a_run_shows_its_batch_its_config_and_evaluation_images(tmp_path, monkeypatch):
    """The batch is the one that show-batch draws; names and images are those of the model."""
    drawn, draw = [], showcase.draw

    def recorded(tiles, captions, **how):
        drawn.append((tiles, captions))
        return draw(tiles, captions, **how)

    monkeypatch.setattr(showcase, "draw", recorded)
    config = load_config("digits")
    config.model.options = "depth=1"
    config.schedule.epochs, config.schedule.warmup_epochs = 1, 0
    config.train.tensorboard = True
    deit_jax.train(config, str(tmp_path))
    (seen, told), (images, names) = drawn
    tiles, captions, _ = show_batch.batch_of_step(config, 0, showcase.IMAGES)
    np.testing.assert_array_equal(seen, tiles)
    assert told == captions

    model = deit_jax.load_model(tmp_path)
    source = data.open_source(config.dataset, "eval")
    pixels = [source.fetch(number)[0].numpy() for number in range(showcase.IMAGES)]
    labels = [int(source.fetch(number)[1]) for number in range(showcase.IMAGES)]
    found = np.asarray(model(deit_jax.preprocess(model, pixels))).argmax(-1)
    expected = [str(a) if a == b else f"{a}\nNOT {b}" for a, b in zip(labels, found, strict=True)]
    assert names == expected
    assert len(set(names)) > 1
    large = Image.fromarray(pixels[3]).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images[3], large)

    events = _events(tmp_path)
    assert sorted(events.Tags()["images"]) == ["eval/images", "train/batch"]
    (event,) = events.Images("eval/images")
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    assert picture.size == (event.width, event.height)
    (event,) = events.Tensors("config")
    text = event.tensor_proto.string_val[0].decode()
    assert json.loads(text)["schedule"]["epochs"] == 1
