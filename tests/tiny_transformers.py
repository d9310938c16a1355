"""Tiny vision transformers that timm does not have, registered under names of their own.

``test_vit`` of timm has 6 blocks of 64 channels, patches of 16 px and a class token. `NAMES` adds one with class and
register tokens, one without either, and an Eva with rotary position embeddings, as DINOv3 has. ``tiny_clip`` has the
norm before the blocks that CLIP has.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

_SIZE = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 5}
_CONFIG = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "num_classes": 5, "input_size": (3, 64, 64)}
_CONFIG |= {"first_conv": "patch_embed.proj", "classifier": "head"}
NAMES = ("test_vit", "tiny_registers", "tiny_plain", "tiny_rotary")

default_cfgs = generate_default_cfgs(
    dict.fromkeys((*NAMES[1:], "tiny_clip", "tiny_linear"), _CONFIG)
)  # timm looks for this name


def _build(kind, name, options, **given):
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(kind, name, False, feature_cfg=features, **_SIZE | options | given)


@register_model
def tiny_registers(pretrained=False, **given):
    options = {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1}
    return _build(VisionTransformer, "tiny_registers", options, **given)


@register_model
def tiny_plain(pretrained=False, **given):
    return _build(VisionTransformer, "tiny_plain", {"class_token": False, "global_pool": "avg"}, **given)


@register_model
def tiny_clip(pretrained=False, **given):
    return _build(VisionTransformer, "tiny_clip", {"pre_norm": True}, **given)


@register_model
def tiny_rotary(pretrained=False, **given):
    options = {"num_reg_tokens": 4, "use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3"}
    options |= {"rope_rotate_half": True, "qkv_bias": False, "init_values": 0.1}
    return _build(Eva, "tiny_rotary", options, **given)


class _Linear(nn.Module):
    def __init__(self, **given):
        super().__init__()
        self.linear = nn.Linear(3, 5)


@register_model
def tiny_linear(pretrained=False, **given):
    """A model without features."""
    return build_model_with_cfg(_Linear, "tiny_linear", False, **given)
