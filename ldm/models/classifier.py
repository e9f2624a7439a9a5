"""A small digit classifier: the judge of MNIST samples, never a part of sampling."""

from torch import Tensor, nn


class DigitClassifier(nn.Module):
    """CNN for [B, 1, 32, 32] images in [-1, 1]. `features` [B, 128] is the space in which kernel distances are measured."""

    def __init__(self, width: int = 32, classes: int = 10):
        super().__init__()

        def block(c_in, c_out):
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.SiLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2))  # fmt: skip

        self.features = nn.Sequential(
            nn.Conv2d(1, width // 2, 5, stride=2, padding=2), nn.SiLU(),  # [B, width/2, 16, 16]
            block(width // 2, width), block(width, 2 * width),  # [B, 2*width, 4, 4]
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * width, 128), nn.SiLU())  # fmt: skip
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # [B, classes] logits
