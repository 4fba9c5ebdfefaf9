"""Backbones map images to embeddings: float32 ``(B, C, H, W)`` to float32 ``(B, D)``."""

from clfed.backbones.conv4 import Conv4
from clfed.backbones.encoder import Encoder
from clfed.backbones.identity import Identity
from clfed.backbones.mlp import MLP
from clfed.backbones.zoo import ResNet18, TorchvisionBackbone

__all__ = ["MLP", "Conv4", "Encoder", "Identity", "ResNet18", "TorchvisionBackbone"]
