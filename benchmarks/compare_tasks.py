"""The shipped models as compare.py's: images, denoiser, labels, and the features that KID is measured in."""

import torch
from tiny import Clip, Judge

from ldm import comparison
from ldm.checkpoints import load_model
from ldm.comparison import Task
from ldm.data.emoji import FIRST_STYLES, Emoji
from ldm.data.mnist import MNIST
from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.images import from_uint8
from ldm.metrics import judge_digits

TASKS = list(comparison.TASKS)


class _Model:
    def task(self, name):
        if name not in self.tasks:
            self.tasks[name] = Task(name, self.images, self.D, self.shape, self.first_stage)
        return self.tasks[name]


class Mnist(_Model):
    """Digits from the front of the test set, at most 1,000, or from number 7,000 on (tuning); features and labels by the shipped
    classifier, KID to the 5,000 digits after the first 1,000."""

    most, usual = 1000, 256
    features = "the digit classifier's 128 features, to 5,000 other test digits"

    def __init__(self, data, n, device, tuning=False):
        test, model = MNIST(data, train=False), load_model("mnist", device=device)
        own = slice(7000, 7000 + n) if tuning else slice(n)
        self.images, self.labels = from_uint8(test.images[own]).to(device), test.labels[own]
        self.D = Denoiser(model.network, model.schedule, model.parameterization)
        self.first_stage, self.shape, self.tasks = None, (1, 32, 32), {}
        self.classifier = load_model("mnist-classifier", device="cpu")
        self.reference = judge_digits(self.classifier, from_uint8(test.images[1000:6000]))[0]

    def measure(self, x, task):
        """{measure: [N]} and the features of the samples x."""
        x = task.to_images(x)
        features, p = judge_digits(self.classifier, x.clamp(-1, 1).cpu())
        return task.measure(x) | dict(features=features, accuracy=(p.argmax(1) == self.labels).float())


class Tiny(_Model):
    """Held-out emoji in a random order, the first ones, at most 128, or those after them (tuning), without prompts; features of the
    shipped CLIP, KID to the held-out images after the first 128. The label is the category, by the judge: a held-out name is one
    that it cannot know."""

    name, most, usual = "tiny", 128, 128
    features = "the tiny CLIP's 128 features, to the 219 other held-out images. Label accuracy: the category, by the judge"

    def __init__(self, data, n, device, tuning=False):
        held_out, model = Emoji(data, train=False, styles=FIRST_STYLES), load_model(self.name, device=device)
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        own = order[self.most : self.most + n] if tuning else order[:n]
        self.images, self.categories = from_uint8(held_out.images[own]).to(device), [held_out.categories[i] for i in own]
        self.D, self.first_stage, self.tasks = LatentDenoiser(model, ""), model, {}
        self.shape, self.clip, self.judge = (model.channels, model.image_size, model.image_size), Clip(device), Judge(device)
        self.reference = self.clip.features(from_uint8(held_out.images[order[self.most :]]))

    def measure(self, z, task):
        """{measure: [N]} and the features of the images of latents z."""
        x = task.to_images(z)
        shown = x.clamp(-1, 1)
        right = self.judge.category(shown, self.categories).float()
        return task.measure(x) | dict(features=self.clip.features(shown), accuracy=right)


class TinyFlow(Tiny):
    """The same images with the rectified flow."""

    name = "tiny-flow"


MODELS = {"mnist": Mnist, "tiny": Tiny, "tiny-flow": TinyFlow}
