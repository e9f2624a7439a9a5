"""Conditions -> tokens [B, M, width] for the U-Net's cross-attention: the frozen text encoders of Stable Diffusion, M = 77, and
the class embedder of latent diffusion, M = 1.

The text encoders' networks are those of transformers and open_clip, under the names that published checkpoints use; the byte-pair
vocabulary is the one inside open_clip. Nothing is ever fetched: the weights come with the diffusion model's checkpoint.
"""

import unicodedata
import warnings
from functools import cache

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.modules.encoders.labels import class_labels
from ldm.util import resolve_path

CLIP_VIT_L_14 = "openai/clip-vit-large-patch14"
NO_VISION = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 1, "image_size": 1}  # built, and dropped


class TextEncoder(nn.Module):
    """What both encoders share: from strings to token ids, and the checks.

    max_length is the number of ids per prompt, `pad` the id after the prompt's end, `tokenizer` cuts strings into ids.
    unused: how the names of those weights begin that published checkpoints hold, but nothing reads.
    """

    unused: tuple[str, ...] = ()

    def __init__(self, tokenizer, max_length, pad):
        super().__init__()
        self.tokenizer, self.max_length, self.pad = tokenizer, max_length, pad

    def tokenize(self, prompts):
        """A string or a list of B strings -> ids [B, max_length], int64: start of text, the prompt, end of text, padding.
        A prompt of more than max_length - 2 ids is cut, and a warning says what was left out."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompts = {prompts!r}: give a string or a list of at least one string")
        ids = torch.full((len(prompts), self.max_length), self.pad)
        for row, prompt in zip(ids, prompts, strict=True):
            own = self.tokenizer.encode(prompt)
            if rest := own[self.max_length - 2 :]:
                warnings.warn(f"a prompt of {len(own)} tokens is longer than the {self.max_length - 2} that the text encoder "
                              f"takes; left out is {self.tokenizer.decode(rest).strip()!r}", stacklevel=2)  # fmt: skip
            own = [self.tokenizer.sot_token_id, *own[: self.max_length - 2], self.tokenizer.eot_token_id]
            row[: len(own)] = torch.tensor(own)
        return ids

    def encode(self, prompts):
        """A string or a list of B strings, "" being the empty prompt -> tokens [B, max_length, width], float32.
        ValueError for anything else."""
        return self(self.tokenize(prompts).to(next(self.parameters()).device))


class FrozenCLIPEmbedder(TextEncoder):
    """Stable Diffusion v1: the text tower of CLIP ViT-L/14 (Radford et al. 2021), its last layer after the final norm.
    Prompts are padded with end-of-text, and the padding is not masked.

    version, device, freeze and layer are arguments of published configs; the device is the model's, and the weights come
    from the checkpoint, so that only the known version and layer="last" are accepted (ValueError).
    text_config   values of transformers' CLIPTextConfig that differ from ViT-L/14's, for models of another size
    """

    def __init__(self, version=CLIP_VIT_L_14, device=None, max_length=77, freeze=True, layer="last", text_config=None):
        super().__init__(transformers_tokenizer(), max_length, pad=49407)
        if version != CLIP_VIT_L_14 and text_config is None:
            raise ValueError(f"version = {version!r}: known is {CLIP_VIT_L_14!r}; describe another one by text_config")
        if layer != "last":
            raise ValueError(f'layer = {layer!r}: only "last" is supported')
        config = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                  "num_attention_heads": 12, "max_position_embeddings": max_length, "hidden_act": "quick_gelu",
                  "bos_token_id": 49406, "eos_token_id": 49407}  # fmt: skip
        clip = CLIPTextModel(CLIPTextConfig(**config | (text_config or {})))
        clip = getattr(clip, "text_model", clip)  # older versions of transformers wrap it once more
        # Checkpoints hold it. Real numbers even where the weights are built on "meta", to be loaded later.
        clip.embeddings.register_buffer("position_ids", torch.arange(max_length, device="cpu")[None], persistent=True)
        self.transformer = nn.ModuleDict({"text_model": clip})
        self.eval().requires_grad_(not freeze)

    def forward(self, ids):
        """ids [B, max_length] -> tokens [B, max_length, width], float32."""
        return self.transformer["text_model"](input_ids=ids).last_hidden_state.float()


class FrozenOpenCLIPEmbedder(TextEncoder):
    """Stable Diffusion v2: the text tower of an OpenCLIP model (Cherti et al. 2023), padded with zeros.

    arch          an architecture's name in open_clip
    layer         "last" or "penultimate" (Stable Diffusion v2): after how many blocks the final norm is applied
    text_config   values of its text tower that differ (width, heads, layers, vocab_size, embed_dim ...), for other sizes
    vocabulary    path of a byte-pair vocabulary in CLIP's format instead of CLIP's own, relative to the repository if need be
    version, device and freeze are arguments of published configs; the device is the model's, the weights come from the
    checkpoint. The last block is kept where it is not used: published checkpoints hold it.
    """

    def __init__(self, arch="ViT-H-14", version=None, device=None, max_length=77, freeze=True, layer="last",
                 text_config=None, vocabulary=None):  # fmt: skip
        super().__init__(bpe_tokenizer(vocabulary), max_length, pad=0)
        config = open_clip.get_model_config(arch)
        if config is None or "hf_model_name" in config["text_cfg"]:
            raise ValueError(f'arch = {arch!r}: open_clip has no text tower of this name; Stable Diffusion v2 has "ViT-H-14"')
        if layer not in ("last", "penultimate"):
            raise ValueError(f'layer = {layer!r}: known are "last" and "penultimate"')
        self.skipped = 1 if layer == "penultimate" else 0
        text = config["text_cfg"] | {"context_length": max_length} | (text_config or {})
        embed_dim = text.pop("embed_dim", config["embed_dim"])
        self.model = open_clip.CLIP(embed_dim, NO_VISION, text, config.get("quick_gelu", False))
        del self.model.visual
        last = len(self.model.transformer.resblocks) - 1
        self.unused = ("model.logit_scale", "model.text_projection", *([f"model.transformer.resblocks.{last}."] * self.skipped))
        mask = torch.full((max_length, max_length), float("-inf"), device="cpu").triu(1)  # causal; never on "meta"
        self.model.register_buffer("attn_mask", mask, persistent=False)
        self.eval().requires_grad_(not freeze)

    def forward(self, ids):
        """ids [B, max_length] -> tokens [B, max_length, width], float32."""
        clip = self.model
        x = clip.token_embedding(ids) + clip.positional_embedding  # [B, M, width]
        for block in clip.transformer.resblocks[: len(clip.transformer.resblocks) - self.skipped]:
            x = block(x, attn_mask=clip.attn_mask)
        return clip.ln_final(x).float()


class ClassEmbedder(nn.Module):
    """One learned token for each class label (Rombach et al. 2022, cin256-v2), under the published name `embedding`.

    n_classes   of labels. 1001 are the classes of ImageNet and a last label for no class, which guidance uses
    empty       the label for no class; None: the last of 1001, and none otherwise
    key         of upstream's training; without meaning here
    """

    def __init__(self, embed_dim, n_classes=1000, key="class", empty=None):
        super().__init__()
        self.n_classes = n_classes
        self.empty = 1000 if empty is None and n_classes == 1001 else empty
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def encode(self, labels):
        """Class labels, a number or a list of B (see `class_labels`) -> tokens [B, 1, embed_dim], float32."""
        return self(class_labels(labels, self.n_classes, self.empty).to(self.embedding.weight.device))

    def forward(self, labels):
        """labels [B], int64 -> tokens [B, 1, embed_dim], float32."""
        return self.embedding(labels)[:, None].float()


def bpe_tokenizer(vocabulary=None):
    """open_clip's tokenizer with its own vocabulary or one in the same format, by its path."""
    return SimpleTokenizer() if vocabulary is None else SimpleTokenizer(str(resolve_path(vocabulary)))


@cache
def transformers_tokenizer():
    """open_clip's tokenizer, with strings cleaned as transformers' CLIPTokenizer does (which Stable Diffusion v1 used):
    composed (NFC) and in lower case, without open_clip's repair of HTML entities and typographic quotes."""
    tokenizer = bpe_tokenizer()
    # Letter by letter: str.lower() of a whole word would make another letter of a final Greek sigma.
    tokenizer.clean_fn = lambda text: "".join(c.lower() for c in unicodedata.normalize("NFC", text))
    return tokenizer
