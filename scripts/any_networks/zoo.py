"""Networks of torchvision, timm and transformers with random weights: the smallest member of each family, small inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .own import Made

TORCHVISION = {  # a family's smallest member, and the side of its images
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32, "googlenet": 32,
    "inception_v3": 96, "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "regnet_y_400mf": 32,
    "regnet_x_400mf": 32, "resnet18": 32, "resnext50_32x4d": 32, "wide_resnet50_2": 32, "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32, "swin_t": 64, "swin_v2_t": 64, "vgg11": 32, "vgg11_bn": 32, "vit_b_16": 224}
TIMM = {"test_vit": 160, "test_resnet": 64, "test_convnext": 64, "test_efficientnet": 64, "test_mambaout": 64,
        "mixer_s32_224": 224, "ghostnet_050": 64, "repvgg_a0": 64}


def images(side: int) -> Callable[[int], torch.Tensor]:
    return lambda n: torch.randn(n, 3, side, side)


def torchvision_net(name: str) -> Made:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=4), images(TORCHVISION[name]), 4


def timm_net(name: str) -> Made:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=4), images(TIMM[name]), 4


def texts(n: int) -> dict[str, torch.Tensor]:
    """Eight tokens, the last ones of some texts hidden."""
    mask = (torch.arange(8) < torch.randint(3, 9, (n, 1))).long()
    return {"input_ids": torch.randint(1, 50, (n, 8)) * mask, "attention_mask": mask}


def transformers_net(name: str) -> Made:
    import transformers as t

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 4}
    sized = {**small, "vocab_size": 50, "max_position_embeddings": 16}
    make: dict[str, Callable[[], tuple[Any, Any]]] = {
        "vit": lambda: (t.ViTForImageClassification(t.ViTConfig(**small, image_size=16, patch_size=8)), images(16)),
        "swin": lambda: (t.SwinForImageClassification(t.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=4)),
            images(32)),
        "bert": lambda: (t.BertForSequenceClassification(t.BertConfig(**sized)), texts),
        "distilbert": lambda: (t.DistilBertForSequenceClassification(t.DistilBertConfig(
            dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=50, max_position_embeddings=16, num_labels=4)), texts),
        "gpt2": lambda: (t.GPT2ForSequenceClassification(t.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, num_labels=4, pad_token_id=0)), texts),
        "wav2vec2": lambda: (t.Wav2Vec2ForSequenceClassification(t.Wav2Vec2Config(
            **small, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, classifier_proj_size=16)),
            lambda n: torch.randn(n, 400))}
    return *make[name](), 4


TRANSFORMERS = ("vit", "swin", "bert", "distilbert", "gpt2", "wav2vec2")
ZOO: dict[str, Callable[[], Made]] = {
    **{f"torchvision:{name}": lambda name=name: torchvision_net(name) for name in TORCHVISION},  # type: ignore[misc]
    **{f"timm:{name}": lambda name=name: timm_net(name) for name in TIMM},  # type: ignore[misc]
    **{f"transformers:{name}": lambda name=name: transformers_net(name) for name in TRANSFORMERS}}  # type: ignore[misc]
