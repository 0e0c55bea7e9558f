"""Networks of the library transformers: its configurations at tiny sizes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Build = Callable[[Any], nn.Module]


class Outputs(nn.Module):
    """A model of the library as a network that takes tensors and gives one."""

    def __init__(self, model: nn.Module, field: str = "logits", argument: str = "") -> None:
        super().__init__()
        self.model, self.field, self.argument = model, field, argument

    def forward(self, x: Tensor) -> Tensor:
        settings = {"return_dict": True}
        found = (
            self.model(**{self.argument: x}, **settings)
            if self.argument
            else self.model(x, **settings)
        )
        output: Tensor = getattr(found, self.field)
        return output


class Causal(nn.Module):
    """A decoder without a cache; logits with the classes in dimension 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False, return_dict=True).logits.transpose(1, 2)


_IMAGE, _TOKENS = ((3, 32, 32),), (8,)
_VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "image_size": 32, "patch_size": 8, "num_labels": 5,
}  # fmt: skip
_TEXT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 32, "max_position_embeddings": 16, "num_labels": 5,
}  # fmt: skip


def _images(t: Any, config: str, model: str, **settings: Any) -> nn.Module:
    return Outputs(getattr(t, model)(getattr(t, config)(**settings)))


def _resnet(t: Any) -> nn.Module:
    return _images(
        t,
        "ResNetConfig",
        "ResNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        layer_type="basic",
        num_labels=5,
    )


def _bottleneck(t: Any) -> nn.Module:
    return _images(
        t,
        "ResNetConfig",
        "ResNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_labels=5,
    )


def _mobilenet_v1(t: Any) -> nn.Module:
    return _images(
        t,
        "MobileNetV1Config",
        "MobileNetV1ForImageClassification",
        image_size=32,
        depth_multiplier=0.25,
        min_depth=8,
        num_labels=5,
    )


def _mobilenet_v2(t: Any) -> nn.Module:
    return _images(
        t,
        "MobileNetV2Config",
        "MobileNetV2ForImageClassification",
        image_size=32,
        depth_multiplier=0.25,
        num_labels=5,
    )


def _efficientnet(t: Any) -> nn.Module:
    return _images(
        t,
        "EfficientNetConfig",
        "EfficientNetForImageClassification",
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
        num_labels=5,
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 40],
        kernel_sizes=[3, 3, 5],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 2],
        expand_ratios=[1, 6, 6],
        depthwise_padding=[],
    )


def _convnext(t: Any) -> nn.Module:
    return _images(
        t,
        "ConvNextConfig",
        "ConvNextForImageClassification",
        hidden_sizes=[8, 16],
        depths=[1, 2],
        num_stages=2,
        image_size=32,
        num_labels=5,
        layer_scale_init_value=0.5,
    )


def _convnext_v2(t: Any) -> nn.Module:
    return _images(
        t,
        "ConvNextV2Config",
        "ConvNextV2ForImageClassification",
        hidden_sizes=[8, 16],
        depths=[1, 2],
        num_stages=2,
        image_size=32,
        num_labels=5,
    )


def _regnet(t: Any) -> nn.Module:
    return _images(
        t,
        "RegNetConfig",
        "RegNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[16, 24],
        depths=[1, 2],
        groups_width=8,
        num_labels=5,
    )


def _swin(t: Any) -> nn.Module:
    return _images(
        t,
        "SwinConfig",
        "SwinForImageClassification",
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        num_labels=5,
    )


def _segformer(t: Any) -> nn.Module:
    return _images(
        t,
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=5,
    )


def _poolformer(t: Any) -> nn.Module:
    return _images(
        t,
        "PoolFormerConfig",
        "PoolFormerForImageClassification",
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        patch_size=3,
        patch_sizes=[7, 3, 3, 3],
        num_labels=5,
    )


def _vision(config: str, model: str) -> Build:
    return lambda t: _images(t, config, model, **_VIT)


def _text(config: str, model: str, **settings: Any) -> Build:
    return lambda t: Outputs(getattr(t, model)(getattr(t, config)(**{**_TEXT, **settings})))


def _distilbert(t: Any) -> nn.Module:
    config = t.DistilBertConfig(
        vocab_size=40,
        dim=16,
        n_layers=2,
        n_heads=4,
        hidden_dim=32,
        max_position_embeddings=16,
        num_labels=5,
    )
    return Outputs(t.DistilBertForSequenceClassification(config))


def _gpt2(t: Any) -> nn.Module:
    config = t.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    return Causal(t.GPT2LMHeadModel(config))


def _opt(t: Any) -> nn.Module:
    config = t.OPTConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=32,
        num_attention_heads=4,
        max_position_embeddings=16,
        word_embed_proj_dim=16,
    )
    return Causal(t.OPTForCausalLM(config))


def _llama(t: Any) -> nn.Module:
    config = t.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return Causal(t.LlamaForCausalLM(config))


def _t5(t: Any) -> nn.Module:
    config = t.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    return Outputs(t.T5EncoderModel(config), "last_hidden_state")


def _wav2vec2(t: Any) -> nn.Module:
    config = t.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        conv_dim=[8, 8],
        conv_stride=[4, 2],
        conv_kernel=[8, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    return Outputs(t.Wav2Vec2ForCTC(config))


NETWORKS: dict[str, tuple[Build, tuple[tuple[int, ...] | int, ...]]] = {
    "ResNet": (_resnet, _IMAGE),
    "ResNet (bottleneck)": (_bottleneck, _IMAGE),
    "MobileNet-v1": (_mobilenet_v1, _IMAGE),
    "MobileNet-v2": (_mobilenet_v2, _IMAGE),
    "EfficientNet": (_efficientnet, _IMAGE),
    "ConvNeXt": (_convnext, _IMAGE),
    "ConvNeXt-v2": (_convnext_v2, _IMAGE),
    "RegNet": (_regnet, _IMAGE),
    "PoolFormer": (_poolformer, _IMAGE),
    "ViT": (_vision("ViTConfig", "ViTForImageClassification"), _IMAGE),
    "DeiT": (_vision("DeiTConfig", "DeiTForImageClassification"), _IMAGE),
    "BEiT": (_vision("BeitConfig", "BeitForImageClassification"), _IMAGE),
    "Swin": (_swin, _IMAGE),
    "SegFormer": (_segformer, _IMAGE),
    "BERT": (_text("BertConfig", "BertForSequenceClassification"), _TOKENS),
    "DistilBERT": (_distilbert, _TOKENS),
    "ELECTRA": (
        _text("ElectraConfig", "ElectraForSequenceClassification", embedding_size=8),
        _TOKENS,
    ),
    "ALBERT": (
        _text("AlbertConfig", "AlbertForSequenceClassification", embedding_size=8),
        _TOKENS,
    ),
    "GPT-2": (_gpt2, _TOKENS),
    "OPT": (_opt, _TOKENS),
    "Llama": (_llama, _TOKENS),
    "T5 encoder": (_t5, _TOKENS),
    "wav2vec 2.0": (_wav2vec2, ((320,),)),
}


def build(name: str) -> nn.Module:
    """A network of the zoo; needs the library."""
    import transformers

    return NETWORKS[name][0](transformers)
