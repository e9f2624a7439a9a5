"""The U-Net against diffusers' independent implementation at the same random weights, and against the published names."""

import re
from pathlib import Path

import diffusers
import pytest
import torch
from common import randomised
from torch import nn

from ldm.modules.diffusionmodules.openaimodel import PatchUNetModel, UNetModel

SD_V1 = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, attention_resolutions=[4, 2, 1], num_res_blocks=2,
             channel_mult=[1, 2, 4, 4], num_heads=8, use_spatial_transformer=True, transformer_depth=1, context_dim=768,
             use_checkpoint=True, legacy=False)  # fmt: skip


def to_diffusers(state, blocks, head_dim):
    """Published names -> diffusers' names."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^time_embed\.0", "time_embedding.linear_1", name)
        name = re.sub(r"^time_embed\.2", "time_embedding.linear_2", name)
        name = re.sub(r"^label_emb\.0\.0", "add_embedding.linear_1", name)
        name = re.sub(r"^label_emb\.0\.2", "add_embedding.linear_2", name)
        name = re.sub(r"^label_emb", "class_embedding", name)
        name = re.sub(r"^input_blocks\.0\.0", "conv_in", name)
        name = re.sub(r"^out\.0", "conv_norm_out", name)
        name = re.sub(r"^out\.2", "conv_out", name)
        if match := re.match(r"middle_block\.(\d)\.(.*)", name):
            place = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[match[1]]
            name = f"mid_block.{place}.{match[2]}"
        elif match := re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.(.*)", name):
            side, i, j, rest = match[1], int(match[2]), int(match[3]), match[4]
            level, k = divmod(i - 1 if side == "input" else i, blocks + 1)
            block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
            is_resnet = re.match(r"(in_layers|emb_layers|out_layers|skip_connection)", rest)
            if side == "input" and k == blocks:
                name = f"{block}.downsamplers.0.{rest.replace('op.', 'conv.')}"
            elif side == "output" and j > 0 and (rest.startswith("conv.") or is_resnet):
                name = f"{block}.upsamplers.0.{rest}"
            else:
                name = f"{block}.{'resnets' if is_resnet else 'attentions'}.{k}.{rest}"
        for ours, theirs in {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
                             "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
                             }.items():  # fmt: skip
            name = name.replace(ours, theirs)
        if ".qkv." in name:  # AttentionBlock, legacy order (head, qkv, dim)
            parts = value.squeeze(-1) if value.ndim == 3 else value
            parts = parts.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(1, 2)
            for x, part in zip("qkv", parts, strict=True):
                renamed[name.replace("qkv", f"to_{x}")] = part
            continue
        if "attentions" in name and "transformer_blocks" not in name and value.ndim in (1, 3) and head_dim:
            name = name.replace(".norm.", ".group_norm.").replace(".proj_out.", ".to_out.0.")
            value = value.squeeze(-1) if value.ndim == 3 else value
        renamed[name] = value
    return renamed


def check(ours, theirs, head_dim=None, blocks=1, context=None, y=None, size=(16, 24), **kwargs):
    randomised(ours)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), blocks, head_dim))  # strict
    x = torch.randn(2, ours.in_channels, *size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 977])
    with torch.no_grad():
        expected = theirs.eval()(x, t, *([] if context is None else [context]), **kwargs).sample
        out = ours(x, t, context, y)
    assert expected.abs().mean() > 0.1
    assert (out - expected).abs().max() < 1e-4


CROSS = dict(in_channels=4, out_channels=4, norm_num_groups=32, cross_attention_dim=24,
             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip


@pytest.mark.parametrize("blocks", [1, 2])
def test_cross_attention_as_in_sd_v1(blocks):
    ours = UNetModel(16, 4, 32, 4, blocks, [1], channel_mult=[1, 2], num_heads=4, use_spatial_transformer=True, context_dim=24)
    theirs = diffusers.UNet2DConditionModel(
        **CROSS, block_out_channels=(32, 64), layers_per_block=blocks, attention_head_dim=4
    )  # their name for the number of heads
    check(ours, theirs, blocks=blocks, context=torch.randn(2, 7, 24))


def test_cross_attention_as_in_sd_v2():
    """Linear projections, fixed head size, two transformer layers."""
    ours = UNetModel(16, 4, 32, 4, 1, [1], channel_mult=[1, 2], num_head_channels=16, use_spatial_transformer=True,
                     context_dim=24, use_linear_in_transformer=True, transformer_depth=2)  # fmt: skip
    theirs = diffusers.UNet2DConditionModel(
        **CROSS, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=(2, 4), use_linear_projection=True,
        transformer_layers_per_block=2)  # fmt: skip
    check(ours, theirs, context=torch.randn(2, 7, 24))


def test_class_labels_next_to_cross_attention():
    ours = UNetModel(16, 4, 32, 4, 1, [1], channel_mult=[1, 2], num_heads=4, use_spatial_transformer=True, context_dim=24,
                     num_classes=10)  # fmt: skip
    theirs = diffusers.UNet2DConditionModel(
        **CROSS, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4, num_class_embeds=10
    )
    y = torch.tensor([3, 9])
    check(ours, theirs, context=torch.randn(2, 7, 24), y=y, class_labels=y)


def test_no_attention_but_in_the_middle_against_the_conditional_model():
    """UNet2DConditionModel with plain blocks only; its middle keeps the cross-attention, as ours does."""
    ours = UNetModel(16, 4, 32, 4, 2, [], channel_mult=[1, 2], num_heads=4, use_spatial_transformer=True, context_dim=24)
    theirs = diffusers.UNet2DConditionModel(**{**CROSS, "down_block_types": ("DownBlock2D",) * 2,
                                               "up_block_types": ("UpBlock2D",) * 2},
                                            block_out_channels=(32, 64), layers_per_block=2, attention_head_dim=4)  # fmt: skip
    check(ours, theirs, blocks=2, context=torch.randn(2, 7, 24))


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("film", [False, True])
def test_self_attention_as_in_adm(updown, film):
    """No cross-attention: AttentionBlock, FiLM conditioning, resampling by residual blocks. Blocks of theirs that do so have no
    attention, so there it acts in the middle only."""
    ours = UNetModel(16, 3, 32, 3, 1, [] if updown else [1, 2], channel_mult=[1, 2], num_head_channels=16,
                     use_scale_shift_norm=film, resblock_updown=updown)  # fmt: skip
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if updown else ("AttnDownBlock2D", "AttnUpBlock2D")
    theirs = diffusers.UNet2DModel(
        in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=32, attn_norm_num_groups=32,
        down_block_types=(down, "DownBlock2D" if updown else down), up_block_types=(up, "UpBlock2D" if updown else up),
        attention_head_dim=16, resnet_time_scale_shift="scale_shift" if film else "default")  # fmt: skip
    check(ours, theirs, head_dim=16, size=(16, 24))


def test_class_conditional_adm_with_learned_variance():
    ours = UNetModel(16, 3, 32, 6, 1, [1, 2], channel_mult=[1, 2], num_head_channels=16, use_scale_shift_norm=True, num_classes=10)
    theirs = diffusers.UNet2DModel(
        in_channels=3, out_channels=6, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=32, attn_norm_num_groups=32,
        down_block_types=["AttnDownBlock2D"] * 2, up_block_types=["AttnUpBlock2D"] * 2, attention_head_dim=16,
        resnet_time_scale_shift="scale_shift", num_class_embeds=10)  # fmt: skip
    y = torch.tensor([3, 9])
    check(ours, theirs, head_dim=16, y=y, class_labels=y)


def test_new_attention_order_is_a_permutation_of_the_legacy_one():
    legacy = randomised(UNetModel(16, 1, 32, 1, 1, [1], channel_mult=[1], num_heads=4))
    new = UNetModel(16, 1, 32, 1, 1, [1], channel_mult=[1], num_heads=4, use_new_attention_order=True).eval()
    state = {k: v.unflatten(0, (4, 3, 8)).transpose(0, 1).flatten(0, 2) if ".qkv." in k else v
             for k, v in legacy.state_dict().items()}  # fmt: skip
    new.load_state_dict(state)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 500])
    assert torch.allclose(legacy(x, t), new(x, t), atol=1e-5)


def test_sd_v1_names_and_shapes():
    lines = (Path(__file__).parent / "data" / "sd-v1-state-dict.tsv").read_text().splitlines()
    prefix = "model.diffusion_model."
    published = {name.removeprefix(prefix): tuple(map(int, shape.split("x")))
                 for name, shape in (line.split("\t") for line in lines if line.startswith(prefix))}  # fmt: skip
    with torch.device("meta"):
        unet = UNetModel(**SD_V1)
    assert {k: tuple(v.shape) for k, v in unet.state_dict().items()} == published
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_half_precision_weights_take_and_give_float32():
    unet = randomised(
        UNetModel(16, 4, 32, 4, 1, [1], channel_mult=[1, 2], num_heads=4, use_spatial_transformer=True, context_dim=24)
    )
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 977]), torch.randn(2, 7, 24)
    with torch.no_grad():
        expected = unet(x, t, context)
        for dtype in (torch.bfloat16, torch.float16):
            out = unet.to(dtype)(x, t, context)
            assert out.dtype == torch.float32
            assert (out - expected).norm() / expected.norm() < 0.05


def test_recomputing_activations_changes_nothing():
    arguments = dict(image_size=16, in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1, attention_resolutions=[1],
                     channel_mult=[1], num_heads=2)  # fmt: skip
    plain, recomputing = (randomised(UNetModel(**arguments, use_checkpoint=c)).train().requires_grad_(True) for c in (False, True))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 977])
    for unet in (plain, recomputing):
        unet(x, t).square().mean().backward()
    for p, q in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)


def test_patches_hold_the_same_image():
    unet = randomised(PatchUNetModel(1, 1, patch_size=2, image_size=16, model_channels=32, num_res_blocks=1,
                                     attention_resolutions=[],
                                     channel_mult=[1], num_heads=2))  # fmt: skip
    unet.unet = nn.Identity()
    unet.unet.forward = lambda x, *_: x
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(unet(x, torch.tensor([0, 1])), x)


@pytest.mark.parametrize("change, message", [
    (dict(model_channels=48), "multiple of 32"), (dict(num_heads=-1), "give exactly one"), (dict(dims=3), "two-dimensional"),
    (dict(context_dim=8), "cross-attention needs both"), (dict(num_res_blocks=[1]), "one per level"),
    (dict(num_classes="many"), "num_classes = 'many'"), (dict(num_heads=5), "does not divide"),
])  # fmt: skip
def test_wrong_configurations_are_refused(change, message):
    arguments = dict(image_size=16, in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1, attention_resolutions=[1],
                     channel_mult=[1, 2], num_heads=2)  # fmt: skip
    with pytest.raises(ValueError, match=message):
        UNetModel(**{**arguments, **change})


def test_wrong_inputs_are_refused():
    unet = UNetModel(16, 1, 32, 1, 1, [1], channel_mult=[1, 2], num_heads=2)
    x, t = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    for arguments, message in [
        ((torch.zeros(2, 3, 8, 8), t), "takes \\[B, 1, H, W\\]"), ((torch.zeros(2, 1, 7, 8), t), "divisible by 2"),
        ((x, t[:1]), "one per sample"), ((x, t, torch.zeros(2, 7, 8)), "no cross-attention"),
        ((x, t, None, t), "not class-conditional"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            unet(*arguments)


def test_compiles_as_one_graph():
    """torch.compile without a graph break; by the backend that traces only, so that no C compiler is needed."""
    torch.compiler.reset()  # what other tests compiled of the same code counts for its limits
    unet = randomised(UNetModel(16, 4, 32, 4, 1, [1], channel_mult=[1, 2], num_heads=4, use_spatial_transformer=True,
                                context_dim=24))  # fmt: skip
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 500]), torch.randn(2, 7, 24)
    with torch.inference_mode():
        expected = unet(x, t, context)
        unet.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(unet(x, t, context), expected, rtol=1e-4, atol=1e-4)
