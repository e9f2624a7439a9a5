"""Small classifiers, of digits and of emoji: the judges of samples, never a part of sampling."""

from torch import Tensor, nn

from ldm.util import resolve_path


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


class EmojiClassifier(nn.Module):
    """CNN for [B, 3, 64, 64] images in [-1, 1]: (logits of the names [B, N], of the categories [B, 8]). `features` [B, 256] is the
    space in which kernel distances are measured; `names` and `categories` are what the logits stand for.

    names: a text file with one name a line, here or in the repository.
    """

    categories = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion", "Symbols",
                  "Travel & Places")  # fmt: skip

    def __init__(self, names, width=48):
        super().__init__()
        self.names = resolve_path(names).read_text(encoding="utf-8").splitlines()

        def block(c_in, c_out, stride):
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.GroupNorm(8, c_out), nn.SiLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.SiLU())  # fmt: skip

        self.features = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2), nn.SiLU(),  # [B, width, 32, 32]
            block(width, width, 2), block(width, 2 * width, 2), block(2 * width, 4 * width, 2),  # [B, 4 width, 4, 4]
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * width, 256), nn.SiLU())  # fmt: skip
        self.name, self.category = nn.Linear(256, len(self.names)), nn.Linear(256, len(self.categories))

    def forward(self, x):
        features = self.features(x)
        return self.name(features), self.category(features)
