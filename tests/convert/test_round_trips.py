"""To PyTorch and back, bit by bit; timm, transformers and torchvision load and are loaded."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

import deit_jax
from deit_jax import trees
from deit_jax.checkpoints import model_folder
from deit_jax.convert import detect, from_torch, mapping, timm_folder, to_torch, torch_files
from deit_jax.models import imagenet, registry
from deit_jax.models.network import split_model
from tests.convert import peak_memory
from tests.convert.conftest import (
    SMALL,
    command,
    numpy_state,
    options,
    random_folder,
    random_variables,
    save,
    timm_twin,
)
from tests.oracles import reference_vit, timm_models
from tests.oracles.torchvision_ops import import_torchvision

TRANSFORMERS_ATOL = 2e-5  # relative to the largest logit


def assert_same_bits(got, want):
    """Same keys, dtypes, shapes and bits."""
    assert set(got) == set(want)
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        np.testing.assert_array_equal(got[key], value, err_msg=key)


def assert_same_logits(model, module, images):
    """Compares ours with a torch module's, which may be transformers' with an output object."""
    got = np.asarray(jax.jit(lambda m, x: m(x))(model, images))
    with torch.no_grad():
        want = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    want = getattr(want, "logits", want).numpy()
    assert np.abs(got - want).max() <= TRANSFORMERS_ATOL * np.abs(want).max()


def load(path):
    """A file's state dict as NumPy arrays."""
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    content = torch.load(path, weights_only=True)
    return {key: tensor.numpy() for key, tensor in content.get("model", content).items()}


def load_into(module, state):
    module.load_state_dict({key: torch.from_numpy(v) for key, v in state.items()}, strict=True)


def write_back(read, path, form):
    """What `read` holds, through a model folder and out again."""
    folder = path.with_name("model")
    model_folder.write_model(folder, read.variables, read.info)
    to_torch.write(folder, path, form)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", SMALL)
def test_from_timm_through_the_commands_and_back(tmp_path, name, suffix):
    want = timm_twin(name)
    source = save(tmp_path / f"a{suffix}", numpy_state(want), container="state_dict")
    folder, back = tmp_path / "model", tmp_path / f"b{suffix}"
    assert command("convert", source, folder) == 0
    assert deit_jax.load_model(folder).info.name == name
    assert command("export-torch", folder, back, "--format", "timm") == 0
    assert_same_bits(load(back), numpy_state(want))
    load_into(timm_twin(name, seed=1), load(back))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_from_jax_and_back_in_every_format(tmp_path, name):
    variables, info = random_variables(name)
    model_folder.write_model(tmp_path / "model", variables, info)
    refused = {"deit_testing": ("torchvision",), "deit_testing_distilled": ("torchvision",)}
    refused["regnety_testing"] = ("hf",)
    for form in to_torch.FORMATS:
        for suffix in ("",) if form == "hf" else (".safetensors", ".pth"):
            path = tmp_path / f"{form}{suffix}"
            if form in refused.get(name, ("hf", "torchvision")):
                with pytest.raises(deit_jax.InputError, match=f"{name}.*timm"):
                    to_torch.write(tmp_path / "model", path, form)
                assert not path.exists()
                continue
            to_torch.write(tmp_path / "model", path, form)
            read = from_torch.read(path)
            assert_same_bits(trees.flat(read.variables), trees.flat(variables))
            if path.name in ("timm.pth", "torchvision.pth"):  # a bare state dict says nothing else
                assert (read.info.name, read.info.num_classes) == (info.name, info.num_classes)
            else:
                assert read.info == info


@pytest.mark.parametrize("name", [*SMALL[:3], "parallel_testing", "hmlp_testing"])
def test_reference_layout(tmp_path, name, images):
    """A file under "model", with gamma_1 for DeiT III, loads into a module with those names."""
    chosen = options(name) | {"num_classes": 7}
    if name == "parallel_testing":
        chosen["parallel"] = True
    want = timm_models.randomise(reference_vit.ReferenceVit(**chosen), seed=0)
    source = tmp_path / "a.pth"
    torch.save({"model": want.state_dict(), "optimizer": {}, "epoch": 299}, source)
    read = from_torch.read(source)
    assert read.info.name == name
    assert read.layout == ("timm" if name.startswith("deit_") else "reference")
    assert_same_logits(read.model(), want, images)
    state = load(write_back(read, tmp_path / "b.pth", "fb"))
    assert_same_bits(state, numpy_state(want))
    load_into(reference_vit.ReferenceVit(**chosen), state)


def test_timm_reads_the_references_resmlp(tmp_path):
    """Its own filter renames the reference's tensors; ours go both ways."""
    from timm.models.mlp_mixer import checkpoint_filter_fn

    twin = timm_twin("resmlp_testing")
    read = from_torch.from_tensors(numpy_state(twin), what="a file")
    path = write_back(read, tmp_path / "a.pth", "fb")
    state = {key: torch.from_numpy(value) for key, value in load(path).items()}
    assert state["norm.alpha"].shape == (64,)
    renamed = checkpoint_filter_fn(dict(state), twin)
    assert_same_bits({k: v.numpy() for k, v in renamed.items()}, numpy_state(twin))
    again = from_torch.from_tensors(load(path), what="a file")
    assert (again.layout, again.info.name) == ("reference", "resmlp_testing")
    assert_same_bits(trees.flat(again.variables), trees.flat(read.variables))


@pytest.mark.parametrize("name", SMALL[:2])
def test_transformers_loads_our_folder(tmp_path, name, images):
    import transformers

    folder = random_folder(tmp_path / "model", name)
    to_torch.write(folder, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6
    cls = getattr(transformers, config["architectures"][0])
    module, loading = cls.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(deit_jax.load_model(folder), module.eval(), images)


def transformers_model(name, **more):
    import transformers

    kind, suffix = ("DeiT", "WithTeacher") if "distilled" in name else ("ViT", "")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256,
        image_size=32, patch_size=4, **more,
    )  # fmt: skip
    module = getattr(transformers, f"{kind}ForImageClassification{suffix}")(config)
    return timm_models.randomise(module, seed=0)


@pytest.mark.parametrize("name", SMALL[:2])
@pytest.mark.parametrize("form", ["saved", "module names", "pytorch_model.bin"])
def test_from_transformers_and_back(tmp_path, name, form, images):
    folder = tmp_path / "hf"
    module = transformers_model(name, layer_norm_eps=1e-6, num_labels=7)
    module.save_pretrained(folder)
    on_disk = load(folder / "model.safetensors")
    if form == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        save(folder / "pytorch_model.bin", on_disk)
    elif form == "module names":
        save(folder / "model.safetensors", numpy_state(module))
        assert any(".q_proj." in key for key in numpy_state(module))
    read = from_torch.read(folder)
    assert (read.info.name, read.info.class_names) == (name, ())
    assert_same_logits(read.model(), module, images)
    back = write_back(read, tmp_path / "back", "hf")
    assert_same_bits(load(back / "model.safetensors"), on_disk)


def test_transformers_description_travels(tmp_path):
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    transformers_model("deit_testing", **labels).save_pretrained(tmp_path)
    processor = {
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2,
        "size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": 32,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    read = from_torch.read(tmp_path)
    assert read.info.class_names == ("cat", "dog")
    assert (read.info.mean, read.info.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (read.info.crop_ratio, read.info.interpolation) == (0.8, "bilinear")
    assert any("layer_norm_eps 1e-12" in note for note in read.notes)

    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_attention_heads": 4}))
    with pytest.raises(deit_jax.InputError, match="4 attention heads, but deit_testing has 2"):
        from_torch.read(tmp_path)


def test_timm_folder(tmp_path):
    save(tmp_path / "model.safetensors", numpy_state(timm_twin("deit3_testing")))
    settings = {"mean": [0.5, 0.5, 0.5], "std": [0.25] * 3, "crop_pct": 0.9, "num_classes": 7}
    config = {"architecture": "deit3_testing", "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    info = from_torch.read(tmp_path).info
    assert (info.name, info.mean, info.crop_ratio) == ("deit3_testing", (0.5, 0.5, 0.5), 0.9)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "regnety_002", "resmlp_12_224"])
def test_timm_folder_as_timm_writes_it(tmp_path, name):
    _timm_folder(tmp_path, name, num_classes=3)
    read = from_torch.read(tmp_path)
    assert (read.info.name, read.info.num_classes, read.info.overrides) == (name, 3, ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 6}, "6 attention heads, but deit_tiny_patch16_224 has 3"),
        ({"global_pool": "avg", "fc_norm": False}, "global_pool is 'avg', expected 'token'"),
        ({"act_layer": "gelu_tanh"}, "act_layer is 'gelu_tanh', expected 'gelu'"),
        ({"norm_layer": "layernorm2d"}, "norm_layer is 'layernorm2d', expected 'layernorm'"),
        ({"rope_temperature": 10}, "rope_temperature is 10, which is not followed"),
        ({"num_heads": 3, "act_layer": "gelu", "norm_layer": "layernorm"}, None),
        ({"drop_path_rate": 0.1, "pos_drop_rate": 0.1, "init_values": None, "fix_init": 1}, None),
    ],
)
def test_arguments_of_timm_are_the_models_or_refused(tmp_path, arguments, message):
    _timm_folder(tmp_path, "deit_tiny_patch16_224")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["model_args"] |= arguments
    file.write_text(json.dumps(config))
    if message is None:
        assert from_torch.read(tmp_path).info.name == "deit_tiny_patch16_224"
    else:
        with pytest.raises(deit_jax.InputError, match=message):
            from_torch.read(tmp_path)


def test_a_pooling_beside_timms_arguments_counts_too(tmp_path):
    _timm_folder(tmp_path, "deit_tiny_patch16_224")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"global_pool": "avg"}
    del config["model_args"]
    file.write_text(json.dumps(config))
    with pytest.raises(deit_jax.InputError, match="global_pool is 'avg', expected 'token'"):
        from_torch.read(tmp_path)


@pytest.mark.parametrize(
    ("preparation", "note"),
    [
        ({"crop_pct": 0.9}, None),
        ({"crop_pct": 0.9, "crop_mode": "center"}, None),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, None),
        ({"crop_pct": 0.9, "crop_mode": "squash"}, "crop_mode 'squash' is not followed"),
        ({"crop_pct": 1.0, "crop_mode": "border"}, "crop_mode 'border' is not followed"),
    ],
)
def test_images_are_prepared_as_timm_does_or_a_note_says_so(tmp_path, preparation, note):
    import timm.data

    save(tmp_path / "model.safetensors", numpy_state(timm_twin("deit_testing")))
    cfg = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.4] * 3} | preparation
    config = {"architecture": "deit_testing", "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = from_torch.read(tmp_path)
    assert any("crop_mode" in line for line in read.notes) == (note is not None)
    assert note is None or any(note in line for line in read.notes)
    theirs = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8))
    want = timm.data.create_transform(**theirs)(picture).numpy().transpose(1, 2, 0)
    got = deit_jax.preprocess(read.info, picture)[0]
    assert (np.abs(got - want).max() < 1e-5) == (note is None)


def test_a_folder_of_ours_for_timm_keeps_the_whole_image(tmp_path):
    """Also where the weights lost what we say in their file, as when timm saves them again."""
    info = registry.model_info("deit_testing", num_classes=7)
    info = dataclasses.replace(info, crop_ratio=None)
    save(tmp_path / "model.safetensors", numpy_state(timm_twin("deit_testing")))
    (tmp_path / "config.json").write_text(json.dumps(timm_folder.config(info)))
    assert from_torch.read(tmp_path).info.crop_ratio is None


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("DeiTImageProcessor", {"height": 40, "width": 40}),
        ("DeiTImageProcessor", {"shortest_edge": 40}),
        ("DeiTImageProcessor", 40),
        ("CLIPImageProcessor", {"height": 40, "width": 40}),
        ("CLIPImageProcessor", {"shortest_edge": 40}),
        ("CLIPImageProcessor", 40),
    ],
)
def test_a_note_says_where_transformers_resizes_both_sides(tmp_path, kind, size):
    import transformers

    save(tmp_path / "model.safetensors", numpy_state(timm_twin("deit_testing")))
    said = {"image_processor_type": kind, "size": size, "crop_size": 32, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | {"resample": 3}))
    read = from_torch.read(tmp_path)
    assert read.info.crop_ratio == 0.8
    noted = any("transformers resizes both sides to 40; the shorter" in line for line in read.notes)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8))
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    want = theirs(picture, return_tensors="np", do_normalize=False, do_rescale=False)
    whole = np.asarray(picture.resize((40, 40), Image.Resampling.BICUBIC))[4:-4, 4:-4]
    off = np.abs(want["pixel_values"][0].transpose(1, 2, 0) - whole).mean()
    assert noted == (off < 2), off


def _timm_folder(folder, name, **arguments):
    """Writes what timm writes of one of its models, by its own function."""
    import timm
    from timm.models._hub import save_config_for_hf

    module = timm.create_model(name, **arguments)
    save(folder / "model.safetensors", numpy_state(module))
    save_config_for_hf(module, str(folder / "config.json"))


@pytest.mark.slow
def test_torchvision_regnet():
    """Every layer's counter differs here, and all come back."""
    torchvision = import_torchvision()
    module = timm_models.randomise(torchvision.models.regnet_y_400mf(), seed=0)
    state = module.state_dict()
    for number, key in enumerate(key for key in state if key.endswith("num_batches_tracked")):
        state[key].fill_(number)
    read = from_torch.from_tensors(numpy_state(module), what="a file")
    assert (read.info.name, read.layout) == ("regnety_004", "torchvision")
    assert read.info.class_names == imagenet.wnids()
    images = np.random.default_rng(1).standard_normal((1, 64, 64, 3)).astype(np.float32)
    assert_same_logits(read.model(), module, images)
    back = to_torch.tensors(read.variables, read.info, "torchvision")
    assert_same_bits(back, numpy_state(module))


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.list_models())
def test_every_registered_model_is_recognised_by_its_shapes(name):
    _, like = split_model(registry.abstract_model(name, num_classes=3))
    forms = ("timm", "torchvision") if name.startswith("regnet") else ("timm", "fb")
    for form in forms[1:] if name.startswith("vit5") else forms:
        layout = to_torch.layout(registry.model_info(name), form)
        tensors = {
            tensor.key: np.broadcast_to(np.float32(0), tensor.shape)  # one zero, seen many times
            for tensor in mapping.tensors_of(like, layout)
        }
        found_layout = detect.layout_of(tensors, "it")
        # The reference names plain DeiT, and RoPE-ViT without frequencies, as timm does.
        if not name.startswith("deit_") and ("rope" not in name or "mixed" in name):
            assert found_layout is layout
        found = detect.identify(tensors, found_layout, what="it", model=name)
        alone = detect.identify(tensors, found_layout, what="it")
        assert (alone == found) != ("rope_ape" in name)  # which looks as DeiT III
        assert (found.name, found.num_classes, found.overrides) == (name, 3, ())


def test_weights_of_a_training_checkpoint(tmp_path):
    raw, ema = timm_twin("deit_testing"), timm_twin("deit_testing", seed=1)
    content = {"model": raw.state_dict(), "model_ema": ema.state_dict()}
    torch.save(content, tmp_path / "checkpoint.pth")
    for weights, module in (("raw", raw), ("ema", ema)):
        read = from_torch.read(tmp_path / "checkpoint.pth", weights=weights)
        assert read.info.weights == weights
        assert_same_bits(to_torch.tensors(read.variables, read.info, "timm"), numpy_state(module))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.", "module.net."])
def test_half_precision_and_wrappers(tmp_path, prefix):
    want = timm_twin("deit_testing").state_dict()
    for dtype in (torch.bfloat16, torch.float16):
        state = {key: tensor.to(dtype) for key, tensor in want.items()}
        torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "half.pth")
        got, _ = torch_files.read(tmp_path / "half.pth")
        assert_same_bits(got, {key: value.float().numpy() for key, value in state.items()})


@pytest.mark.slow
def test_peak_memory_can_be_measured():
    """`python tests/convert/peak_memory.py` does it for the huge model."""
    peaks = peak_memory.measure("deit_testing")
    assert sorted(peaks) == ["convert", "export", "load_model"]
    assert all(0.05 < peak < 4 for peak in peaks.values()), peaks


def test_a_peak_is_that_of_the_process_alone():
    """Linux hands the peak of the process that starts another down to it."""
    ballast = np.ones(2**28, np.uint8)
    assert peak_memory.peak_gib("-c", "pass") < 0.1
    assert ballast[-1] == 1


def test_a_model_fine_tuned_in_transformers_is_described_anew(tmp_path):
    """transformers keeps our entry of config.json, which then describes another model."""
    import transformers

    to_torch.write(random_folder(tmp_path / "model", "deit_testing"), tmp_path / "hf", "hf")
    assert from_torch.read(tmp_path / "hf").layout == "Hugging Face ViT"
    labels = {0: "cat", 1: "dog", 2: "owl"}
    module = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "hf", id2label=labels, label2id={}, ignore_mismatched_sizes=True
    )
    module.save_pretrained(tmp_path / "tuned")
    assert "deit_jax" in json.loads((tmp_path / "tuned" / "config.json").read_text())
    info = from_torch.read(tmp_path / "tuned").info
    assert (info.num_classes, info.class_names) == (3, ("cat", "dog", "owl"))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("deit_testing", {"no_embed_class": True}),
        ("parallel_testing", {"layer_scale_init": None, "no_embed_class": False}),
        ("deit_testing", {"layer_scale_init": 1e-4}),
        ("deit3_testing", {"no_embed_class": False}),
        ("deit_testing", {"num_heads": 4, "depth": 2}),
    ],
)
def test_unusual_models_come_back_from_files_that_say_what_they_are(tmp_path, name, overrides):
    network, like = split_model(registry.abstract_model(name, num_classes=3, **overrides))
    start = jax.tree.map(lambda x: np.ones(x.shape, np.float32), like)
    model_folder.write_model(tmp_path / "model", start, network.info)
    to_torch.write(tmp_path / "model", tmp_path / "a.safetensors", "timm")
    assert from_torch.read(tmp_path / "a.safetensors").info == network.info


def test_no_new_head_joins_a_trained_one(tmp_path, capsys):
    source = save(tmp_path / "a.safetensors", numpy_state(timm_twin("deit_testing")))
    options = ["--model", "deit_testing_distilled"]
    assert command("convert", source, tmp_path / "model", *options) == 2
    assert "mean of two heads, but the weights of deit_testing have one" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_weights_are_made_to_fit_on_request(tmp_path, capsys):
    source = save(tmp_path / "a.safetensors", numpy_state(timm_twin("deit_testing")))
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    more = ["--model", "deit_testing_distilled", "--image_size", "64", "--num_classes", "3"]
    more += ["--class_names", tmp_path / "names.txt"]
    assert command("convert", source, tmp_path / "model", *more) == 0
    assert "resized from 8×8 to 16×16" in capsys.readouterr().out
    info = deit_jax.load_model(tmp_path / "model").info
    assert (info.name, info.image_size) == ("deit_testing_distilled", 64)
    assert info.class_names == ("cat", "dog", "owl")
