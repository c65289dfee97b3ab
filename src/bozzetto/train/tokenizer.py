"""`bozzetto train tokenizer RECIPE.yaml`: fit a VQ tokenizer in stages, resumably.

The frozen tiny encoder gives latents; they and the pictures are held in memory (`views` augmented views per image), so
that the latent stage costs no image convolutions. Pixel stages decode random half-size windows of the latent grid.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bozzetto.autoencoders.tiny import DOWNSAMPLE, load_tiny
from bozzetto.autoencoders.vq import CodebookEMA, VQConfig, VQTokenizer
from bozzetto.checkpoints.folders import save_tokenizer
from bozzetto.common.files import write_whole
from bozzetto.common.images import contact_sheet
from bozzetto.data import ImageSet, augment, evaluation_view
from bozzetto.train.fit import autocast, channels_last, check_finite, cosine, set_lr, set_states, states_of
from bozzetto.train.folder import RunFolder, data_digest
from bozzetto.train.pictures import note_overlap
from bozzetto.train.recipes import TokenizerRecipe, TokenizerStage

_CHUNK = 64


def patch_critic() -> nn.Module:
    """A small patch discriminator: [B, 3, H, W] in [-1, 1] -> logits [B, 1, H/8, W/8] (Isola et al., arXiv
    1611.07004)."""
    widths = [3, 48, 96, 192]
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.utils.parametrizations.spectral_norm(nn.Conv2d(inner, outer, 4, 2, 1)), nn.LeakyReLU(0.2)]
    layers.append(nn.Conv2d(widths[-1], 1, 3, padding=1))
    return nn.Sequential(OrderedDict(net=nn.Sequential(*layers)))  # called so in checkpoints


def _window(latent: Tensor, pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random half-size window of the latent grid and of the pictures."""
    side = latent.shape[-1] // 2
    top, left = torch.randint(0, latent.shape[-1] - side + 1, (2,), generator=generator).tolist()
    d = DOWNSAMPLE
    x = pictures[:, :, top * d : (top + side) * d, left * d : (left + side) * d]
    return latent[:, :, top : top + side, left : left + side], x.contiguous(memory_format=torch.channels_last)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0, 1], one per image: [B, C, H, W] x 2 -> [B]."""
    return -10 * torch.log10((a - b).square().mean(dim=(1, 2, 3)).clamp_min(1e-10))


class TokenizerFit:
    """A training run in stages. Views of the training images are held as uint8 pictures [M, 3, S, S] and their float16
    latents [M, 32, h, w]. recipe, restart: as for other runs (fit.py)."""

    def __init__(self, recipe: TokenizerRecipe, restart: bool = False):
        self.recipe = recipe
        note_overlap(recipe.train, recipe.test)
        size = recipe.image_size
        sets, test = [s.read(size) for s in recipe.train], recipe.test.read(size)
        self.run = RunFolder(recipe, {"train": data_digest(*sets), "test": data_digest(test)}, restart)
        self.folder = self.run.path / "tokenizer"
        self.generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        config = VQConfig(
            recipe.codes, recipe.code_dim, recipe.width, recipe.pre_blocks, recipe.post_blocks, recipe.image_size
        )
        self.model = channels_last(VQTokenizer(config))
        encoder, decoder = load_tiny(recipe.tiny)
        self.model.encoder.load_state_dict(encoder.state_dict())
        self.model.decoder.load_state_dict(decoder.state_dict())
        self.model.encoder.requires_grad_(False)
        self.codebook = CodebookEMA(self.model.codebook)
        self.critic = channels_last(patch_critic())
        self.held_out = evaluation_view(test.images, size)
        self._encode(sets)

    @torch.no_grad()
    def _encode(self, sets: list[ImageSet]) -> None:
        pictures, latents = [], []
        chunks = [(s, i) for s in sets for _ in range(self.recipe.views) for i in range(0, len(s), _CHUNK)]
        for s, i in tqdm(chunks, desc="encoding views", unit="chunk"):
            x = augment(s.images[i : i + _CHUNK], self.recipe.image_size, self.generator)
            pictures.append((x * 255).round().byte())
            with autocast():
                latents.append(self.model.encoder(x.contiguous(memory_format=torch.channels_last)).float().half())
        self.pictures, self.latents = torch.cat(pictures), torch.cat(latents)

    def begin(self, stage: TokenizerStage) -> None:
        """New optimizers of what a stage trains."""
        m = self.model
        parts = {"latent": [m.pre, m.post], "pixel": [m.pre, m.post, m.decoder], "decoder": [m.post, m.decoder]}
        self.trained = [p for part in parts[stage.kind] for p in part.parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=stage.lr, betas=(0.9, 0.95), weight_decay=1e-4)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=2e-4, betas=(0.5, 0.9))

    def losses(self, stage: TokenizerStage) -> tuple[Tensor, dict[str, float], tuple[Tensor, ...]]:
        """Total loss, its parts, and the decoded and true windows where the critic is asked."""
        m, r = self.model, self.recipe
        pick = torch.randint(len(self.latents), (stage.batch,), generator=self.generator)
        pictures, latent = self.pictures[pick].float() / 255.0, self.latents[pick].float()
        with autocast():
            with torch.set_grad_enabled(stage.kind != "decoder"):
                unit = m.features(latent.contiguous(memory_format=torch.channels_last))
            index = m.nearest(unit.detach())
            code = m.codebook[index]
            predicted = m.latent_of(unit + (code - unit).detach()).float()
            fit = F.mse_loss(predicted, latent)
            commit = (unit - code).square().sum(-1).mean()
            loss = fit + r.commitment * commit
            parts = {"latent": fit.item(), "commit": commit.item()}
            if stage.kind == "latent":
                self.codebook.update(unit.detach().flatten(0, 1), index.flatten(), self.generator)
                return loss, parts, ()
            window, x = _window(predicted, pictures, self.generator)
            y = m.decoder(window).float()
            error = y - x
            pixel = error.abs().mean() + 4 * error.square().mean()
            loss = 0.1 * loss + 5 * pixel
            parts["pixel"] = pixel.item()
            if stage.feature_weight:
                with torch.no_grad():
                    wanted = m.encoder(x)
                feature = (m.encoder(y) - wanted).abs().mean()
                loss = loss + stage.feature_weight * feature
                parts["feature"] = feature.item()
            if stage.kind == "pixel":
                self.codebook.update(unit.detach().flatten(0, 1), index.flatten(), self.generator)
        return loss, parts, (y, x) if stage.adversarial_weight else ()

    def critic_step(self, y: Tensor, x: Tensor) -> float:
        """Hinge loss step of the critic."""
        with autocast():
            real, fake = self.critic(x * 2 - 1), self.critic(y.detach() * 2 - 1)
        loss = F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return loss.item()

    def train_step(self, stage: TokenizerStage, number: int) -> dict[str, float]:
        loss, parts, windows = self.losses(stage)
        check_finite(number, loss.item(), f"loss of stage {stage.kind}")
        if windows:
            self.critic.requires_grad_(False)
            with autocast():
                loss = loss - stage.adversarial_weight * self.critic(windows[0] * 2 - 1).float().mean()
            self.critic.requires_grad_(True)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        if windows:
            parts["critic"] = self.critic_step(*windows)
        return parts

    @torch.no_grad()
    def evaluate(self, count: int | None = None) -> tuple[dict[str, float], Tensor]:
        """Held-out PSNR in dB (mean over images) and code use; and reconstructions [n, 3, S, S]."""
        x = self.held_out[:count]
        used, out = [], []
        for part in x.split(_CHUNK):
            with autocast():
                tokens = self.model.encode(part.contiguous(memory_format=torch.channels_last))
                out.append(self.model.decode(tokens).float())
            used.append(tokens.flatten())
        y = torch.cat(out)
        share = torch.bincount(torch.cat(used), minlength=self.recipe.codes).float()
        share = share / share.sum()
        perplexity = float((-(share * share.clamp_min(1e-12).log()).sum()).exp())
        return {"psnr": float(psnr(x, y).mean()), "codes_used": int((share > 0).sum()), "perplexity": perplexity}, y

    def sheet(self, y: Tensor) -> None:
        rows = torch.stack([self.held_out[: len(y)], y], 1).flatten(0, 1)
        image = contact_sheet((rows * 255).round().byte().permute(0, 2, 3, 1).numpy(), columns=8, scale=2)
        write_whole(self.run.path / "reconstructions.png", image.save)

    def fit(self) -> None:
        """Run the stages that are not done yet, and write the tokenizer's folder."""
        saved = self.run.load()
        first, start = (saved["stage"], saved["step"]) if saved else (0, 0)
        if saved:
            with self.run.reading():
                set_states(self, saved, "model", "codebook", "critic", "generator")
        for number, stage in enumerate(self.recipe.stages[first:], first):
            self.begin(stage)
            if saved and start:
                set_states(self, saved, "optimizer", "critic_optimizer")
            self._stage(number, stage, start)
            start = 0
        figures, _ = self.evaluate()
        self.run.log(stage="final", **figures)
        save_tokenizer(self.folder, self.model, {"recipe": asdict(self.recipe), "held_out": figures})

    def _stage(self, number: int, stage: TokenizerStage, begun: int) -> None:
        bar = tqdm(range(begun, stage.steps), initial=begun, total=stage.steps, desc=f"{number + 1}:{stage.kind}")
        for step in bar:
            set_lr(self.optimizer, cosine(step, stage.steps, stage.lr, stage.warmup))
            parts = self.train_step(stage, step + 1)
            done = step + 1
            if done % self.recipe.save_every == 0 or done == stage.steps:
                figures, y = self.evaluate(128)
                self.run.log(stage=stage.kind, step=done, **parts, **figures)
                bar.set_postfix({"psnr": f"{figures['psnr']:.2f}", "codes": figures["codes_used"]})
                self.sheet(y[:32])
                ended = done == stage.steps
                names = ("model", "codebook", "critic", "critic_optimizer", "optimizer", "generator")
                progress = {"stage": number + ended, "step": 0 if ended else done}
                self.run.save({**progress, **states_of(self, *names)})
