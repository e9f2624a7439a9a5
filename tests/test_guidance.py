"""Losses of what an image shows, against formulas, and parsers of transformers against the networks themselves."""

import json

import pytest
import torch
from pipelines import tokenizer
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTextConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from ldm.checkpoints import load_model
from ldm.clip import load_clip, load_clip_vision
from ldm.constraints import LossConstraint
from ldm.data.emoji import sample_emoji
from ldm.data.regions import by_rules
from ldm.guidance import colour_distance, gram, gram_distance, parsing_distance, silhouette, text_distance
from ldm.masks import make_mask
from ldm.metrics import confusion, mean_iou
from ldm.models.bisenet import FACE, BiSeNet
from ldm.parsers import load_parser


def itself(x):
    return x


def images(n=2, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_parsing_distance_is_the_cross_entropy_of_the_pixels_that_count():
    parse = lambda x: torch.stack([x[:, 0], x[:, 1], x[:, 2]], 1) * 4  # noqa: E731
    x, labels = images(), torch.randint(-1, 3, (2, 32, 32), generator=torch.Generator().manual_seed(1))
    p = parse(x).softmax(1)
    for i, loss in enumerate(parsing_distance(parse, itself, labels)(x)):
        counts = labels[i] >= 0
        exact = -p[i].gather(0, labels[i].clamp_min(0)[None])[0].log()[counts].mean()
        assert torch.allclose(loss, exact)
    e, residual = LossConstraint(parsing_distance(parse, itself, labels[:1]))(x)
    better = parsing_distance(parse, itself, labels[:1])(x + 0.01 * e / e.abs().amax())
    assert e.shape == x.shape and (better < residual).all() and not e[0, :, labels[0] < 0].any()
    for wrong, message in [
        (torch.full((1, 32, 32), 3), "labels has values 3 to 3: the parser's classes are 0 to 2"),
        (torch.full((1, 32, 32), -2), "labels has values -2 to -2"),
        (torch.zeros(1, 16, 16), r"labels has shape \[1, 16, 16\], but the parser answers with 2 of \[32, 32\] pixels"),
        (torch.zeros(3, 32, 32), r"labels has shape \[3, 32, 32\], but the parser answers with 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            parsing_distance(parse, itself, wrong)(x)
    for wrong in (torch.full((1, 32, 32), 0.5), torch.zeros(32, 32)):
        with pytest.raises(ValueError, match="give whole numbers"):
            parsing_distance(parse, itself, wrong)


def test_the_shipped_parser_knows_the_drawings_of_the_repository():
    """It mostly agrees with the rules, which need no network; the border is background where it is white."""
    x = sample_emoji()[0]
    parser = load_model("tiny-parser", device="cpu")
    found = parser.labels(x)
    assert (found == by_rules(x)).float().mean() > 0.85
    outside = torch.zeros(64, 64, dtype=torch.bool)
    outside[[0, -1]] = outside[:, [0, -1]] = True
    assert ((found[:, outside] == 0) == (x[:, :, outside].amin(1) > 0.9)).float().mean() > 0.9
    y, across = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    r, colours = (y**2 + across**2).sqrt(), torch.tensor([(1, 1, 1), (0.8, -0.7, -0.6), (-0.4, 0.3, -0.5)])  # white, red, green
    drawing = colours[(r < 24).long() + (r < 10)].movedim(2, 0)[None]
    for parse in (parser.labels, by_rules):
        rings = parse(drawing)[0]
        for name, place in {"background": r > 27, "red": (r > 13) & (r < 21), "green": r < 7}.items():
            assert (rings[place] == parser.classes.index(name)).float().mean() > 0.9, name
    counts = confusion(torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[0, 1, 1, 1]]]), 4)
    assert counts[0].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [0] * 4, [0] * 4]
    assert mean_iou(counts)[0] == pytest.approx((1 / 2 + 1 / 3) / 2)  # class 2 is not in the labels


def test_the_silhouette_of_an_emoji_is_what_is_not_white():
    emoji = sample_emoji()[0]
    found = silhouette(emoji).argmax(1) == 1
    assert torch.equal(found, emoji.amin(1) < 0.7) and 0.2 < found.float().mean() < 0.8
    assert not silhouette(torch.ones(1, 3, 8, 8)).argmax(1).any() and silhouette(-torch.ones(1, 3, 8, 8)).argmax(1).all()


def test_the_style_of_a_region_is_that_of_its_pixels():
    """All ones: the old distance bit for bit. Pixels outside change neither loss nor gradient. Soft weights: by the formula."""
    vision, emoji = load_clip_vision("tiny-clip", 2, "cpu"), sample_emoji()[0]
    x, reference = emoji[:2], emoji[20:21]
    whole, ones = LossConstraint(gram_distance(vision, itself, reference)), torch.ones(1, 1, 64, 64)
    same = LossConstraint(gram_distance(vision, itself, reference, ones, ones))
    for old, new in zip(whole(x), same(x), strict=True):
        assert torch.equal(old, new)
    right = 1 - make_mask("right", (64, 64))
    region = LossConstraint(gram_distance(vision, itself, reference, right))
    (e, residual), (other_e, other) = region(x), region(torch.where(right > 0, x, emoji[5:7]))
    assert torch.equal(residual, other) and torch.equal(e, other_e) and not e[..., :32].any() and e[..., 32:].any()
    assert not torch.allclose(residual, region(torch.where(right > 0, emoji[5:7], x))[1], rtol=0.01)
    pixels, soft = lambda x: x.flatten(2).transpose(1, 2), torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    x, y = images(2, 16), images(1, 16, 1)
    f, w, g = pixels(soft * x), soft.flatten(1), pixels(y)[0]
    exact = [torch.linalg.matrix_norm(f[i].T @ torch.diag(w[i] / w[i].sum()) @ f[i] - g.T @ g / 256) for i in range(2)]
    assert torch.allclose(gram_distance(pixels, itself, y, soft)(x), torch.stack(exact), rtol=1e-4)


def test_the_style_of_a_set_is_the_mean_of_its_gram_matrices():
    pixels, x = lambda x: x.flatten(2).transpose(1, 2), images(2, 16)
    whole_set = torch.stack([images(3, 16, 1), images(3, 16, 2)])  # [2, 3, 3, 16, 16]
    wanted = torch.stack([sum(gram(pixels(y[None])) for y in own)[0] / 3 for own in whole_set])
    exact = torch.linalg.matrix_norm(gram(pixels(x)) - wanted)
    assert torch.allclose(gram_distance(pixels, itself, whole_set)(x), exact, rtol=1e-4)
    assert torch.allclose(gram_distance(pixels, itself, whole_set[:1])(x)[0], exact[0], rtol=1e-4)
    assert torch.equal(gram_distance(pixels, itself, whole_set[:, :1])(x), gram_distance(pixels, itself, whole_set[:, 0])(x))
    halves = torch.zeros(2, 3, 1, 16, 16)
    halves[..., 8:] = 1  # each image's own mask
    alone = gram_distance(pixels, itself, whole_set[:, 1], reference_where=halves[:, 1])(x)
    assert torch.equal(gram_distance(pixels, itself, whole_set[:, 1:2], reference_where=halves[:, 1:2])(x), alone)


@pytest.mark.parametrize("where, message", [
    (torch.ones(1, 1, 8, 8), r"where has shape \[1, 1, 8, 8\], but the images have \[2, 3, 16, 16\]: give \[B or 1, 1, H, W\]"),
    (torch.ones(3, 1, 16, 16), r"where has shape \[3, 1, 16, 16\]"),
    (torch.ones(16, 16), r"where has shape \[16, 16\]"),
    (torch.zeros(1, 1, 16, 16), "where has values from 0 to 0: give 0"),
    (torch.full((1, 1, 16, 16), 2.0), "where has values from 2 to 2: give 0"),
])  # fmt: skip
def test_a_region_that_does_not_fit_is_one_sentence(where, message):
    pixels, x = lambda x: x.flatten(2).transpose(1, 2), images(2, 16)
    with pytest.raises(ValueError, match=message):
        gram_distance(pixels, itself, x, where)(x)
    with pytest.raises(ValueError, match=f"reference_{message}"):
        gram_distance(pixels, itself, x, None, where)
    with pytest.raises(ValueError, match="where is given, but the features have 255 places"):
        gram_distance(lambda x: pixels(x)[:, 1:], itself, x, torch.ones(1, 1, 16, 16))(x)


def test_the_text_distance_is_of_clip_s_features_and_is_less_for_the_own_name():
    clip, unit = load_clip("cpu"), torch.nn.functional.normalize
    x, names = sample_emoji()[0][:16], sample_emoji()[1][:16]
    losses = torch.stack([text_distance(clip, itself, name)(x) for name in names], 1)
    own = losses.diagonal()
    assert torch.allclose(own, text_distance(clip, itself, names)(x), atol=1e-5)
    exact = 1 - unit(clip.network.encode_image(x), dim=1) @ unit(clip.encode_text(names), dim=1).T
    assert torch.allclose(losses, exact, atol=1e-5) and own.mean() < losses.mean() - 0.1
    e, _ = LossConstraint(text_distance(clip, itself, "violin"))(x[:2])
    assert torch.isfinite(e).all() and e.flatten(1).norm(dim=1).min() > 0
    with pytest.raises(ValueError, match="texts has 2 entries, but x0 has 16 samples"):
        text_distance(clip, itself, ["a", "b"])(x)


def test_the_colour_is_that_of_the_place():
    x, where = images(), torch.zeros(1, 1, 32, 32)
    where[..., :8] = 1
    loss = colour_distance(itself, (0.5, 0, -0.5), where)(x)
    assert torch.allclose(loss, (x[..., :8].mean((2, 3)) - torch.tensor([0.5, 0, -0.5])).square().sum(1), atol=1e-6)
    e, _ = LossConstraint(colour_distance(itself, (0.5, 0, -0.5), where))(x)
    assert not e[..., 8:].any() and e[..., :8].all()
    assert torch.allclose(colour_distance(itself, [1, 1, 1])(torch.ones(1, 3, 4, 4)), torch.zeros(1))
    for colour in ((0, 0), (0, 0, 2)):
        with pytest.raises(ValueError, match="give red, green and blue from -1 to 1"):
            colour_distance(itself, colour)


def test_a_segformer_of_a_folder_is_a_parser(tmp_path):
    config = SegformerConfig(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
                             strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
                             num_labels=5, id2label={i: f"class {i}" for i in range(5)})  # fmt: skip
    network = SegformerForSemanticSegmentation(config).eval()
    network.save_pretrained(tmp_path)
    parser, x = load_parser(tmp_path, device="cpu"), images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        logits = network(pixel_values=((x + 1) / 2 - mean) / std).logits
    logits = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear")
    assert torch.allclose(parser(x), logits, atol=1e-5) and parser.classes == [f"class {i}" for i in range(5)]
    assert torch.equal(parser.labels(x), logits.argmax(1))
    e, residual = LossConstraint(parsing_distance(parser, itself, parser.labels(x.flip(0))))(x)
    assert torch.isfinite(e).all() and e.any() and (residual > 0).all()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(size={"height": 16, "width": 16}, image_mean=[0.5] * 3)))
    assert load_parser(tmp_path, device="cpu").size == 16 and load_parser(tmp_path, device="cpu")(x).shape == (2, 5, 32, 32)
    with pytest.raises(ValueError, match="a SegFormer has its own, leave them out"):
        load_parser(tmp_path, ["sky", "sea"])


def test_a_clipseg_of_a_folder_is_asked_for_each_class(tmp_path):
    text = CLIPTextConfig(vocab_size=514, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                          max_position_embeddings=20, projection_dim=16, bos_token_id=512, eos_token_id=513).to_dict()  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
    config = CLIPSegConfig(text_config=text, vision_config=vision, projection_dim=16, reduce_dim=8, extract_layers=[0, 1, 2],
                           decoder_num_attention_heads=2, decoder_intermediate_size=16)  # fmt: skip
    network = CLIPSegForImageSegmentation(config).eval()
    network.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    parser, x = load_parser(tmp_path, ["a dog", "background"], device="cpu"), images(size=48)
    logits = parser(x)
    assert logits.shape == (2, 2, 48, 48) and torch.allclose(parser(x[1:])[0], logits[1], atol=1e-5)
    swapped = load_parser(tmp_path, ["background", "a dog"], device="cpu")(x)
    assert torch.allclose(swapped.flip(1), logits, atol=1e-4)
    for classes in (None, "a dog", ["a dog"]):
        with pytest.raises(ValueError, match="give at least two texts"):
            load_parser(tmp_path, classes)


def bisenet_by_names(p, x):
    """BiSeNet's equations on a state dict by its published names, without modules."""
    conv = lambda x, name, stride=1: F.conv2d(x, p[f"{name}.weight"], None, stride, p[f"{name}.weight"].shape[-1] // 2)  # noqa: E731
    norm = lambda x, name: F.batch_norm(x, *(p[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))  # noqa: E731
    block = lambda x, name: norm(conv(x, f"{name}.conv"), f"{name}.bn").relu()  # noqa: E731
    mean = lambda x: x.mean((2, 3), keepdim=True)  # noqa: E731

    def refine(x, name):
        x = block(x, f"{name}.conv")
        return x * norm(conv(mean(x), f"{name}.conv_atten"), f"{name}.bn_atten").sigmoid()

    y = F.max_pool2d(norm(conv(x, "cp.resnet.conv1", 2), "cp.resnet.bn1").relu(), 3, 2, 1)
    features = {}
    for i, layer in enumerate(f"cp.resnet.layer{n}" for n in (1, 2, 3, 4)):
        for j in (0, 1):
            at, stride = f"{layer}.{j}", 2 if i and not j else 1
            z = norm(conv(y, f"{at}.conv1", stride), f"{at}.bn1").relu()
            z = norm(conv(z, f"{at}.conv2"), f"{at}.bn2")
            y = (z + (norm(conv(y, f"{at}.downsample.0", 2), f"{at}.downsample.1") if stride == 2 else y)).relu()
        features[i] = y
    double = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
    top = block(double(refine(features[3], "cp.arm32") + block(mean(features[3]), "cp.conv_avg")), "cp.conv_head32")
    top = block(double(refine(features[2], "cp.arm16") + top), "cp.conv_head16")
    y = block(torch.cat([features[1], top], 1), "ffm.convblk")
    y = y + y * conv(conv(mean(y), "ffm.conv1").relu(), "ffm.conv2").sigmoid()
    y = conv(block(y, "conv_out.conv"), "conv_out.conv_out")
    return F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True)


def test_a_bisenet_of_a_file_is_a_parser(tmp_path):
    """Random weights, as published files are written: before torch 1.6, of data-parallel training, and as safetensors."""
    torch.manual_seed(0)
    tensors = BiSeNet().state_dict()
    tensors |= {k: torch.rand_like(v) + 0.5 for k, v in tensors.items() if v.ndim == 1 and "num" not in k}
    x = images(1, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    big = F.interpolate(x, (512, 512), mode="bicubic", antialias=True)
    exact = F.interpolate(bisenet_by_names(tensors, ((big + 1) / 2 - mean) / std), (64, 64), mode="bilinear")
    torch.save({f"module.{k}": v for k, v in tensors.items()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({k: v for k, v in tensors.items() if "num_batches" not in k}, tmp_path / "new.safetensors")
    for name in ("old.pth", "new.safetensors"):
        parser = load_parser(tmp_path / name, device="cpu")
        assert torch.allclose(parser(x), exact, atol=1e-4 * exact.abs().max()) and parser.classes == list(FACE)
    e, _ = LossConstraint(parsing_distance(parser, itself, parser.labels(x.flip(3))))(x)
    assert torch.isfinite(e).all() and e.any()


def test_other_files_are_one_sentence(tmp_path):
    small = {"conv_out.conv_out.weight": torch.zeros(3, 256, 1, 1), "cp.resnet.conv1.weight": torch.zeros(64, 3, 7, 7)}
    file = tmp_path / "file.pth"
    for content, classes, message in [
        ({"a": torch.zeros(1)}, None, r"is no BiSeNet with the names of face parsing \(cp.resnet ...\): a$"),
        ([1], None, "is no BiSeNet with the names"),
        (small, None, "has 3 classes, but 19 names: give classes, one for each"),
        (small, ["a", "b", "c"], "is no BiSeNet with a ResNet-18: missing, unknown or of another shape: .* more$"),
        (itself, None, "cannot be read as tensors"),
    ]:
        torch.save(content, file)
        with pytest.raises(ValueError, match=message):
            load_parser(file, classes, "cpu")


def test_other_folders_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="give a folder with the config.json of a SegFormer or a CLIPSeg, or a BiSeNet's file"):
        load_parser(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="its model_type is 'bert', known are 'segformer' and 'clipseg'"):
        load_parser(tmp_path)
