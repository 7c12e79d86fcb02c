"""RoPE-ViT and ViT-5: the layouts of their authors' files, other sizes, and what looks alike."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import deit_jax
from deit_jax.checkpoints import model_folder
from deit_jax.convert import buffers, from_torch, layouts, mapping, to_torch
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import split_model
from tests.convert.conftest import numpy_state, random_folder, timm_twin
from tests.convert.test_round_trips import assert_same_bits, assert_same_logits, load, write_back
from tests.oracles import timm_models
from tests.oracles.reference_vit import interpolate

MIXED, AXIAL, VIT5 = "vit_testing_rope_mixed_ape", "vit_testing_rope", "vit5_testing"


def reference_state(name, module):
    """The state dict of timm's or our oracle by the names of the model's authors."""
    state = numpy_state(module)
    if "rope.freqs" in state:
        state["freqs"] = state.pop("rope.freqs").reshape(2, 4, 64 // 2)
        side = round(state["pos_embed"].shape[1] ** 0.5)
        rows, columns = np.divmod(np.arange(side**2, dtype=np.float32), side)
        state |= {"freqs_t_x": columns, "freqs_t_y": rows}
    return state


@pytest.mark.parametrize("name", [AXIAL, MIXED, VIT5])
def test_files_of_the_authors_both_ways(tmp_path, name, images):
    raw, ema = timm_twin(name), timm_twin(name, seed=1)
    content = {
        key: {k: torch.from_numpy(v) for k, v in reference_state(name, module).items()}
        for key, module in (("model", raw), ("model_ema", ema))
    }
    torch.save(content | {"epoch": 799}, tmp_path / "a.pth")
    for weights, module in (("raw", raw), ("ema", ema)):
        read = from_torch.read(tmp_path / "a.pth", weights=weights)
        assert (read.info.name, read.info.weights, read.layout) == (name, weights, "reference")
        assert_same_logits(read.model(), module, images)
        state = load(write_back(read, tmp_path / f"{weights}.pth", "fb"))
        want = reference_state(name, module)
        for key in want:
            if ".rope" in key:  # ViT-5's constants; PyTorch's powers are off by a rounding
                np.testing.assert_allclose(state[key], want[key], rtol=2e-7)
                want[key] = state[key]
        assert_same_bits(state, want)
        again = from_torch.read(tmp_path / f"{weights}.pth")
        assert again.info == read.info


@pytest.mark.parametrize("name", [AXIAL, MIXED, VIT5])
def test_other_sizes_as_the_reference_evaluates_them(name):
    """Rotary positions go on counting; learned ones are resized."""
    module = timm_twin(name)
    read = from_torch.from_tensors(reference_state(name, module), what="it")
    larger = timm_models.fresh(name, num_classes=7, image_size=48)
    state = module.state_dict()
    if "pos_embed" in state:
        field = state["pos_embed"].reshape(8, 8, -1)
        state["pos_embed"] = interpolate(field, (12, 12), antialias=False).reshape(1, 144, -1)
    larger.load_state_dict(state)
    images = np.random.default_rng(1).standard_normal((2, 48, 48, 3)).astype(np.float32)
    adapted = from_torch.adapt(read, image_size=48)
    assert_same_logits(adapted.model(), larger.eval(), images)
    assert len(adapted.notes) == len(read.notes) + ("pos_embed" in state)


def test_a_checkpoint_of_another_size_says_so_by_its_buffers():
    state = reference_state(MIXED, timm_twin(MIXED))
    places = np.arange(36, dtype=np.float32)
    state = {k: v for k, v in state.items() if k != "pos_embed"}
    state |= {"freqs_t_x": places % 6, "freqs_t_y": places // 6}
    with pytest.raises(InputError, match=r"no registered model has .*pos_embed False"):
        from_torch.from_tensors(state, what="it")
    name = "vit_small_patch16_rope_mixed_224"
    tensors = zeros(name, layouts.REFERENCE) | buffers.of(
        registry.model_info(name, image_size=192), layouts.REFERENCE
    )
    assert from_torch.from_tensors(tensors, what="it").info.image_size == 192


def zeros(name, layout):
    """The weights of a registered model with 3 classes, of which each is one zero."""
    _, like = split_model(registry.abstract_model(name, num_classes=3))
    tensors = mapping.tensors_of(like, layout)
    return {t.key: np.broadcast_to(np.float32(0), t.shape) for t in tensors}


def test_what_no_tensor_tells_is_asked_for():
    """RoPE-ViT (axial) with learned positions has the tensors of DeiT III."""
    name = "vit_small_patch16_rope_ape_224"
    tensors = zeros(name, layouts.REFERENCE)
    read = from_torch.from_tensors(tensors, what="it")
    assert read.info.name == "deit3_small_patch16_224"
    assert any(name in note and "--model" in note for note in read.notes)
    said = [from_torch.from_tensors(tensors, what="it", model=name)]
    said.append(from_torch.from_tensors(tensors, what="it", described={"model": name}))
    for read in said:
        assert read.info.name == name
        assert not any("--model" in note for note in read.notes)
    with pytest.raises(InputError, match=r'made for rope "none".*has rope "axial"'):
        from_torch.adapt(from_torch.from_tensors(tensors, what="it"), model=name)


@pytest.mark.parametrize(
    ("factor", "answer"), [(1 + 1e-8, None), (1 + 1e-4, "off by up to 1e-04"), (1.01, InputError)]
)
def test_frequencies_in_a_file_are_compared_with_ours(factor, answer):
    state = numpy_state(timm_twin(VIT5))
    key = "blocks.1.attn.rope.freqs"
    state[key] = np.float32(state[key] * factor)
    if answer is InputError:
        with pytest.raises(InputError, match=f"{key} differs from the model's own by 1.0e-02"):
            from_torch.from_tensors(state, what="it")
    else:
        notes = [n for n in from_torch.from_tensors(state, what="it").notes if "rotary" in n]
        assert len(notes) == (answer is not None)
        assert all(answer in note for note in notes)


@pytest.mark.parametrize("form", ["timm", "hf", "torchvision"])
def test_timm_and_transformers_have_no_vit5(tmp_path, form):
    random_folder(tmp_path / "model", VIT5)
    with pytest.raises(InputError, match=f"{VIT5}.*fb"):
        to_torch.write(tmp_path / "model", tmp_path / "out.pth", form)


def test_a_model_with_overrides_comes_back(tmp_path):
    """Switches that no registered model has travel with the weights."""
    options = {"qk_norm": True, "num_registers": 2, "linear_bias": False, "rope": "axial"}
    model = deit_jax.create_model("deit3_testing", rngs=nnx.Rngs(0), **options)
    deit_jax.save_model(tmp_path / "model", model)
    to_torch.write(tmp_path / "model", tmp_path / "a.safetensors", "fb")
    read = from_torch.read(tmp_path / "a.safetensors")
    assert read.info == model.info
    images = np.ones((1, 32, 32, 3), np.float32)
    want, got = (jax.jit(lambda m, x: m(x))(m, images) for m in (model, read.model()))
    np.testing.assert_array_equal(got, want)
    loaded = model_folder.read_network(tmp_path / "model")[0]
    assert loaded.info == model.info
