"""models/huggingface_models.py: folders of HuggingFace as models here, with the logits of transformers."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from attacks.threat_model.recorded import open_leak
from data.options import DataOptions
from eval.options import SubjectOptions
from eval.subject import open_model
from leak_file import save
from models.external import open_external
from models.huggingface_models import open_huggingface
from tests.models.small_models import picture
from utils.distributed import Processes
from utils.errors import UserError

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": 32, "patch_size": 8}
DINO = {key: value for key, value in SHAPE.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
TOWERS = {"vision_config": SHAPE | IMAGE, "text_config": SHAPE}
KINDS = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SHAPE, **IMAGE, num_labels=5)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO, **IMAGE, num_labels=5)),
    "dinov2_gated": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO, **IMAGE, use_swiglu_ffn=True)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**SHAPE, **IMAGE, num_labels=5)),
    "deit_teacher": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SHAPE, **IMAGE, num_labels=5)),
    "clip": lambda: hf.CLIPForImageClassification(hf.CLIPConfig(**TOWERS, num_labels=5)),
    "clip_vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SHAPE, **IMAGE)),
    "vit_bare": lambda: hf.ViTModel(hf.ViTConfig(**SHAPE, **IMAGE)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SHAPE, vocab_size=50, num_labels=5)),
    "bert_bare": lambda: hf.BertModel(hf.BertConfig(**SHAPE, vocab_size=50)),
    "resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
}


def saved(kind: str, folder) -> torch.nn.Module:
    """Save a model whose biases and norms are not those of a fresh one; return it."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * torch.randn_like(value)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["vit", "dinov2", "deit", "deit_teacher", "clip"])
@torch.inference_mode()
def test_logits_are_those_of_transformers(kind, tmp_path):
    expected = saved(kind, tmp_path)(picture()).logits
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    model = open_external(f"hf:{tmp_path}")
    torch.testing.assert_close(model(picture()), expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-2
    assert model.normalize == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert model.arguments["num_classes"] == 5 and model.grid == (4, 4) and model.patch_size == 8
    subject = SubjectOptions(checkpoint=f"hf:{tmp_path}")
    evaluated, inputs = open_model(Processes(0, 1, torch.device("cpu")), subject, DataOptions())
    torch.testing.assert_close(evaluated(picture(), None), expected, rtol=0, atol=1e-5)
    assert inputs.data.mean == (0.1, 0.2, 0.3) and inputs.data.image_size == 32


@pytest.mark.parametrize("kind", ["clip_vision", "vit_bare"])
@torch.inference_mode()
def test_a_model_without_a_classifier_gets_the_one_that_is_asked_for(kind, tmp_path):
    saved(kind, tmp_path)
    with pytest.raises(UserError, match="a classifier.*num_classes N"):
        open_external(f"hf:{tmp_path}")
    one, other = (open_external(f"hf:{tmp_path}", num_classes=7, seed=3) for _ in range(2))
    assert one(picture()).shape == (2, 7)
    assert one(picture()).equal(other(picture()))
    assert "head.weight" in one.assumed["new"]


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_a_model_of_several_labels_is_one_of_attributes(kind, tmp_path):
    saved(kind, tmp_path)
    assert open_external(f"hf:{tmp_path}").loss == "cross_entropy"
    rewrite(tmp_path, problem_type="multi_label_classification")
    assert open_external(f"hf:{tmp_path}").loss == "bce"


def test_sentences_of_several_labels_are_taken_for_one_class_each_and_said_so(tmp_path):
    saved("bert_bare", tmp_path)
    rewrite(tmp_path, problem_type="multi_label_classification")
    model = open_huggingface(f"hf:{tmp_path}", num_classes=2)
    assert model.loss == "cross_entropy" and "one class each" in model.assumed["loss"]


def test_a_bert_brings_its_tokenizer(tmp_path):
    saved("bert_bare", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    model = open_huggingface(f"hf:{tmp_path}", num_classes=2)
    assert model.vocab_size == 50 and model.tokenizer == "{}"


@torch.inference_mode()
def test_another_side_resizes_the_table(tmp_path):
    saved("clip", tmp_path)
    model = open_external(f"hf:{tmp_path}", image_size=48)
    assert model.grid == (6, 6) and model(picture(48)).isfinite().all()


DARK = '{"image_mean": [127.5, 127.5, 127.5], "image_std": [1, 1, 1]}'


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json of HuggingFace"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json' is no JSON object: get it again"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' is no JSON object: get it again"),
        (lambda folder: (folder / "preprocessor_config.json").write_text(DARK), "do not normalise three colours"),
        (lambda folder: rewrite(folder, hidden_size="32"), "has hidden_size '32': a number above 0 is needed"),
        (
            lambda folder: rewrite(folder, image_size=[32, 64]),
            "has image_size .32, 64.: a number above 0 of equal sides",
        ),
        (lambda folder: rewrite(folder, num_attention_heads=3), "has 3 attention heads, which do not divide"),
        (lambda folder: rewrite(folder, layer_norm_eps=None), "has layer_norm_eps None: a number from 0 to 1"),
        (lambda folder: rewrite(folder, hidden_act="gelu_10"), "is a network with 'gelu_10', not known here"),
        (lambda folder: rewrite(folder, intermediate_size=10**9), "look at 'blocks.0.mlp.fc1.weight'"),
        (lambda folder: rewrite(folder, num_hidden_layers=10**9), "look at 'num_hidden_layers'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is a folder without model.safetensors"),
        (lambda folder: rewrite(folder, num_hidden_layers=3), "another network than its config.json says"),
        (lambda folder: rewrite(folder, model_type="mamba"), "a model of kind 'mamba': known are vit"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, change, line):
    saved("deit", tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=line):
        open_external(f"hf:{tmp_path}")


def test_weights_in_several_files_are_said_to_be(tmp_path):
    KINDS["vit"]().save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(UserError, match="is split over several files: save it in one"):
        open_external(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    "kind, changed, line",
    [
        ("vit", {"image_size": [16, 64]}, "is of images of 16 x 64 pixels: only squares work"),
        ("vit", {"layer_norm_eps": "x"}, "has a config.json with layer_norm_eps 'x'"),
        ("bert", {"layer_norm_eps": 1e-3}, "is a BERT with layer_norm_eps 0.001, not known here: only 1e-12 is"),
        ("bert", {"is_decoder": True}, "is a BERT with is_decoder True"),
        ("bert", {"position_embedding_type": "relative_key"}, "is a BERT with position_embedding_type relative_key"),
        ("bert", {"architectures": ["BertForMultipleChoice"]}, "is a 'BertForMultipleChoice', not known here"),
    ],
)
def test_what_would_give_other_logits_is_refused(kind, changed, line, tmp_path):
    saved(kind, tmp_path)
    open_external(f"hf:{tmp_path}")
    rewrite(tmp_path, **changed)
    with pytest.raises(UserError, match=line):
        open_external(f"hf:{tmp_path}")


def test_a_bert_with_parts_of_another_is_refused(tmp_path):
    saved("bert", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.encoder.layer.0.attention.self.distance_embedding.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="unexpected: encoder.layer.0.attention.self.distance_embedding.weight"):
        open_external(f"hf:{tmp_path}")


@torch.inference_mode()
def test_what_the_towers_config_leaves_out_is_clips_default(tmp_path):
    expected = saved("clip", tmp_path)(picture()).logits
    tower = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    rewrite(tmp_path, vision_config={key: tower[key] for key in tower if key not in ("hidden_act", "layer_norm_eps")})
    torch.testing.assert_close(open_external(f"hf:{tmp_path}")(picture()), expected, rtol=0, atol=1e-5)
    rewrite(tmp_path, vision_config=None)
    with pytest.raises(UserError, match="a vision_config that is no JSON object"):
        open_external(f"hf:{tmp_path}")


@pytest.mark.parametrize("kind", ["deit", "vit"])
@torch.inference_mode()
def test_without_bias_and_with_a_width_that_floats_miss(kind, tmp_path):
    """int(88 * (120 / 88)) is 119."""
    shape = SHAPE | IMAGE | {"hidden_size": 88, "intermediate_size": 120, "qkv_bias": False, "num_labels": 5}
    config, model = {"deit": (hf.DeiTConfig, hf.DeiTForImageClassification),
                     "vit": (hf.ViTConfig, hf.ViTForImageClassification)}[kind]  # fmt: skip
    theirs = model(config(**shape)).eval()
    theirs.save_pretrained(tmp_path)
    ours = open_external(f"hf:{tmp_path}")
    torch.testing.assert_close(ours(picture()), theirs(picture()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "deit", "bert"])
def test_a_model_of_regression_is_taken_for_a_classifier_and_said_so(kind, tmp_path):
    saved(kind, tmp_path)
    assert "loss" not in open_external(f"hf:{tmp_path}").assumed
    rewrite(tmp_path, problem_type="regression")
    assert "problem_type regression" in open_external(f"hf:{tmp_path}").assumed["loss"]


@pytest.mark.parametrize(
    "processor, mean, std",
    [
        ({"image_mean": 0.5, "image_std": 0.25}, 0.5, 0.25),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 2 / 255}, 0.25, 0.25),
        ({"image_mean": [127.5] * 3, "image_std": [127.5] * 3, "do_rescale": False}, 0.5, 0.5),
        ({"do_normalize": False}, 0.0, 1.0),
    ],
)
def test_a_processor_is_written_for_pixels_up_to_255(processor, mean, std, tmp_path):
    saved("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert open_external(f"hf:{tmp_path}").normalize == {"mean": (mean,) * 3, "std": (std,) * 3}


def rewrite(folder, **changed) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


def test_other_kinds_options_and_names_are_refused(tmp_path, monkeypatch):
    saved("resnet", tmp_path)
    with pytest.raises(UserError, match="a model of kind 'resnet'"):
        open_external(f"hf:{tmp_path}")
    saved("dinov2_gated", tmp_path / "gated")
    with pytest.raises(UserError, match=r"gated MLP \(SwiGLU\), which is not known here: .* --model timm:NAME"):
        open_external(f"hf:{tmp_path / 'gated'}")
    with pytest.raises(UserError, match="leave out --checkpoint"):
        open_external(f"hf:{tmp_path}", checkpoint="a.pt")

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match="hf:google/vit is no folder here, and the hub did not give it .*no route"):
        open_external("hf:google/vit")
    for name, line in (("/nowhere", "does not exist"), (tmp_path / "config.json", "is a file")):
        with pytest.raises(UserError, match=f"{line}: pass hf:FOLDER"):
            open_external(f"hf:{name}")


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_leak_of_transformers_own_network_fits(kind, tmp_path):
    """Its gradients come under the names the weights have here; without all of queries, keys and values they cannot."""
    theirs = saved(kind, tmp_path)
    torch.nn.functional.cross_entropy(theirs(picture()).logits, torch.tensor([1, 2])).backward()
    about = {"batch_size": 2, "image_shape": (3, 32, 32)}
    save(tmp_path / "leak.safetensors", theirs, before=theirs, **about)
    ours, scale = open_external(f"hf:{tmp_path}"), {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    leak = open_leak(tmp_path / "leak.safetensors", ours, **scale)
    torch.nn.functional.cross_entropy(ours(picture()), torch.tensor([1, 2])).backward()
    assert leak.gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, value in ours.named_parameters():
        torch.testing.assert_close(leak.gradients[name], value.grad, rtol=1e-4, atol=1e-7)
    gradients = {name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    gradients.pop(next(name for name in gradients if "key" in name or "k_proj" in name))
    save(tmp_path / "part.safetensors", gradients, **about)
    with pytest.raises(UserError, match="does not fit the model: gradients not in the model"):
        open_leak(tmp_path / "part.safetensors", ours, **scale)
