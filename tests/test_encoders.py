# ruff: noqa: E501 (the table of odd strings)
"""The text encoders against transformers and open_clip: ids, names, outputs, and what is refused."""

import random
import warnings

import open_clip
import pytest
import torch
from common import randomised, reference
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.data.emoji import write_vocabulary
from ldm.export_diffusers import to_text_encoder
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder

SMALL_CLIP = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
SMALL_OPEN_CLIP = dict(width=32, heads=4, layers=3)
ENCODERS = {
    "v1": lambda **kwargs: FrozenCLIPEmbedder(text_config=SMALL_CLIP, **kwargs),
    "v2": lambda **kwargs: FrozenOpenCLIPEmbedder(text_config=SMALL_OPEN_CLIP, **{"layer": "penultimate", **kwargs}),
}


def odd_strings():
    """More than 200: scripts, accents composed and not, emoji, digits, markup, blanks, very long ones, random ones."""
    strings = """
        a photograph of an astronaut riding a horse|A PHOTO, in 4K, by Greg|don't they'll we've I'm he'd it's O'Neil's|rock'n'roll
        Ünïcödé façade naïve coöperate|e\u0301te\u0301 a\u0308 n\u0303|zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich
        ΟΔΥΣΣΕΥΣ ς σ Σ|İstanbul ıI|Żółć gęślą jaźń|съешь же ещё этих мягких французских булок|いろはにほへと ちりぬるを|中文字符 测试
        안녕하세요 세계|مرحبا بالعالم|שלום עולם|हिन्दी में पाठ|ไทย ภาษา|😀 😃 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽|🦄unicorn🦄|x²+y²=z² ½ ⅓ №5 Ⅻ|1234567890 3.14159 1,000,000
        0x1F 1e-5 50% $9.99 €5 #tag @user|<b>bold</b> &amp; &lt;tag&gt;|http://example.com/a?b=c&d=e|user@example.org|(((masterpiece))) [low:1.3] {x|y}
        "quoted" 'single' “curly” ‘quotes’ ’s|em—dash en–dash hy-phen … ellipsis|snake_case camelCase kebab-case|a\tb\nc\rd|  many   spaces  |\u00a0nbsp\u2003em\u3000wide
        zero\u200bwidth\u200djoiner|ﬁ ﬂ ligatures Ｆｕｌｌｗｉｄｔｈ|mojibake Ã© â€™|supercalifragilisticexpialidocious|aaaaaaaaaaaaaaaaaaaaaaaaa|....!!!???,,,;;;|~`!@#$%^&*()_+-={}[]
        \\ \\\\ /|'|''|'s 't 're|S'S T'T|\x01\x7f control|𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𝒮𝒸𝓇𝒾𝓅𝓉|Ǆ ǅ ǆ|ß ẞ SS|Å Å Ω Ω|null None nan|C++ C# F#|:-) ;) <3 ^_^|I ❤️ NY|100°C 5′10″
    """
    strings = [s.strip("\n") for line in strings.strip().splitlines() for s in line.strip().split("|")]
    strings += [
        "",
        " ",
        "     ",
        "\n",
        "\t \n",
        "word " * 300,
        "1 " * 300,
        "🐱" * 100,
        "x" * 400,
        "a" * 75,
        "a " * 74,
        "a " * 75,
        "a " * 76,
    ]
    rng = random.Random(0)
    alphabet = "abcXYZ 019 .,'-!é ü ñ ж 中 😀 \t" + "".join(map(chr, range(0x20, 0x180)))
    strings += ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(150)]
    assert len(set(strings)) > 200
    return strings


def transformers_tokenizer(folder):
    """From the same vocabulary, in the form that transformers of every version reads."""
    import json

    ours = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({names.get(k, k): v for k, v in ours.encoder.items()}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, ours.bpe_ranks)]))
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:a prompt of")
def test_v1_ids_are_those_of_transformers(tmp_path):
    strings = odd_strings()
    theirs = transformers_tokenizer(tmp_path)(strings, truncation=True, max_length=77, padding="max_length")["input_ids"]
    ours = ENCODERS["v1"]().tokenize(strings)
    assert ours.dtype == torch.int64
    for string, a, b in zip(strings, ours.tolist(), theirs, strict=True):
        assert a == b, string


@pytest.mark.filterwarnings("ignore:a prompt of")
def test_v2_ids_are_those_of_open_clip():
    strings = odd_strings()
    assert torch.equal(ENCODERS["v2"]().tokenize(strings), open_clip.tokenize(strings))


def test_padding():
    assert ENCODERS["v1"]().tokenize("a cat").tolist() == [[49406, 320, 2368] + [49407] * 74]
    assert ENCODERS["v2"]().tokenize("a cat").tolist() == [[49406, 320, 2368, 49407] + [0] * 73]


@pytest.mark.parametrize("name", ENCODERS)
def test_a_long_prompt_is_cut_and_the_warning_says_where(name):
    encoder = ENCODERS[name]()
    with pytest.warns(UserWarning, match="a prompt of 77 tokens .* takes; left out is 'big dog'$"):
        ids = encoder.tokenize(["a cat", "cat " * 75 + "big dog"])
    assert ids[1, -1] == 49407 and set(ids[1, 1:-1].tolist()) == {2368}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.tokenize("cat " * 75)


def test_v1_has_the_published_names():
    with torch.device("meta"):
        encoder = FrozenCLIPEmbedder()
    prefix = "cond_stage_model."
    published = {k.removeprefix(prefix): v for k, v in reference().items() if k.startswith(prefix)}
    assert {k: list(v.shape) for k, v in encoder.state_dict().items()} == published
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480


def test_v2_has_the_published_names():
    with torch.device("meta"):
        encoder = FrozenOpenCLIPEmbedder(layer="penultimate", version="laion2b_s32b_b79k", device="cuda", freeze=True)
    shapes = {k: list(v.shape) for k, v in encoder.state_dict().items()}
    assert len(shapes) == 6 + 24 * 12
    assert shapes["model.positional_embedding"] == [77, 1024] and shapes["model.text_projection"] == [1024, 1024]
    assert shapes["model.token_embedding.weight"] == [49408, 1024] and shapes["model.logit_scale"] == []
    assert shapes["model.transformer.resblocks.23.mlp.c_fc.weight"] == [4096, 1024]


PROMPTS = ["a photograph of a cat", "", "zwölf Boxkämpfer 😀"]


def test_v1_equals_transformers():
    encoder = randomised(ENCODERS["v1"]())
    theirs = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **SMALL_CLIP)).eval()
    prefix = "text_model." if any(k.startswith("text_model.") for k in theirs.state_dict()) else ""  # by version
    own = {k.removeprefix("transformer.text_model."): v for k, v in encoder.state_dict().items()}
    missing, unexpected = theirs.load_state_dict({prefix + k: v for k, v in own.items() if "position_ids" not in k}, strict=False)
    assert not unexpected and all(k.endswith("position_ids") for k in missing)
    expected = theirs(encoder.tokenize(PROMPTS)).last_hidden_state
    torch.testing.assert_close(encoder.encode(PROMPTS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_v2_equals_transformers(layer):
    """transformers' model of as many layers as are used, with open_clip's weights under its names."""
    encoder = randomised(ENCODERS["v2"](layer=layer))
    theirs = to_text_encoder(encoder).eval()
    assert theirs.config.num_hidden_layers == {"last": 3, "penultimate": 2}[layer] and theirs.config.hidden_act == "gelu"
    expected = theirs(encoder.tokenize(PROMPTS)).last_hidden_state
    torch.testing.assert_close(encoder.encode(PROMPTS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(name, dtype):
    encoder = randomised(ENCODERS[name]())
    exact, half = encoder.encode(PROMPTS), encoder.to(dtype).encode(PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ENCODERS)
def test_frozen_and_samples_do_not_mix(name):
    encoder = ENCODERS[name]()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert all(p.requires_grad for p in ENCODERS[name](freeze=False).parameters())
    together = randomised(encoder).encode(PROMPTS)
    assert together.shape == (3, 77, 32)
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(encoder.encode(prompt)[0], together[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("prompts", [None, [], 3, ["a", 3], [None]])
def test_what_is_no_prompt_is_refused(name, prompts):
    with pytest.raises(ValueError, match="^prompts = .*: give a string or a list"):
        ENCODERS[name]().encode(prompts)


def test_unknown_encoders_are_refused():
    with pytest.raises(ValueError, match="version = 'openai/clip-vit-base-patch32'"):
        FrozenCLIPEmbedder("openai/clip-vit-base-patch32")
    with pytest.raises(ValueError, match="layer = 'pooled'"):
        FrozenCLIPEmbedder(layer="pooled")
    with pytest.raises(ValueError, match="arch = 'ViT-Z-99'"):
        FrozenOpenCLIPEmbedder("ViT-Z-99")
    with pytest.raises(ValueError, match="layer = 'first'"):
        FrozenOpenCLIPEmbedder(layer="first")


def test_a_vocabulary_of_its_own(tmp_path):
    """The part of CLIP's vocabulary that a text uses cuts that text in the same way; any other text still has tokens."""
    captions = ["a smiling cat face", "soccer ball"]
    write_vocabulary(captions, tmp_path / "bpe.txt.gz")
    small = FrozenOpenCLIPEmbedder(vocabulary=tmp_path / "bpe.txt.gz", text_config={**SMALL_OPEN_CLIP, "vocab_size": 700})
    whole = SimpleTokenizer()
    for caption in captions:
        pieces = [small.tokenizer.decoder[i] for i in small.tokenizer.encode(caption)]
        assert pieces == [whole.decoder[i] for i in whole.encode(caption)]
    ids = small.tokenize(captions + ["Żółć 😀"])
    assert ids.max() == small.tokenizer.vocab_size - 1 == ids[0].max() and small.tokenizer.vocab_size < 700
    assert small.encode(["", "Żółć 😀"]).isfinite().all()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gz"):
        FrozenOpenCLIPEmbedder(vocabulary="nowhere.gz")
