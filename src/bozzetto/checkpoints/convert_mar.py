"""Published MAR checkpoints into model folders: read safely, recognised by their tensors, written as a whole.

Sizes, the scale of the tokens and the sampler: Li et al., arXiv 2406.11838. Nothing but shapes is needed to tell the
sizes apart, though the number of heads is in none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bozzetto.autoencoders import kl16
from bozzetto.autoencoders.decoder import numbered
from bozzetto.autoencoders.kl16 import KL16Config
from bozzetto.checkpoints import states
from bozzetto.checkpoints.convert import check_out, read_class_names
from bozzetto.checkpoints.folders import KL16, MASKED, write_model, write_tokenizer
from bozzetto.checkpoints.own_sampling import SAMPLING
from bozzetto.checkpoints.published import MAR_SAMPLER, published
from bozzetto.checkpoints.states import check_storable, family_state, published_size, telling_keys, types_in
from bozzetto.checkpoints.weights import OWN, check_fit, on_meta
from bozzetto.common.classes import note_on_doubles
from bozzetto.common.staging import staged_folder
from bozzetto.errors import UsageError
from bozzetto.targets import mar
from bozzetto.targets.mar import SHAPES, MARConfig

TOKEN_PER_LATENT = 0.2325  # one over the deviation of KL-16's latents of ImageNet
# Averaged weights are those of the published results.
_WRAPPERS = ("model_ema", *states.WRAPPERS)


def convert_mar(checkpoint: Path, vae: Path, out: Path, class_names: Path | None = None, store: str = OWN) -> str:
    """Turn a published MAR (any size, classes, grid) and its autoencoder KL-16 into the model folder `out`.

    checkpoint, vae: torch pickles (opened with weights_only=True) or safetensors files; of a training checkpoint the
    averaged weights are taken where it has any. class_names: a text file with one name per line; None: "0", "1", ...;
    store: see `save_state`. Returns a line about what was found. Raises UsageError for a file of another family,
    missing or misshapen or non-finite weights, parts that do not fit together, an `out` that is not empty, or a missing
    extra package; then nothing is written.
    """
    check_out(out)
    pixels, _ = family_state(vae, states.KL16)
    network, wrapper = family_state(checkpoint, states.MAR, _WRAPPERS)
    size, config = recognise_mar(network, checkpoint)
    latents = _latents_config(pixels, vae, config.grid)
    if config.token_dim != latents.token_dim:
        raise UsageError(
            f"{checkpoint} draws tokens of {config.token_dim} numbers, but {vae} has {latents.token_dim} latent "
            "channels (tokens of several latents are not supported)"
        )
    names = read_class_names(class_names, config.classes)
    check_storable(vae, kl16.decoder_part(pixels), store)
    check_storable(vae, pixels, OWN)
    check_storable(checkpoint, network, store)
    decoder = kl16.latents_state(pixels, latents, 1 / TOKEN_PER_LATENT)
    weights = wrapper or "bare"
    notes = {
        "class_names": names,
        "converted": {"size": size, "weights": weights, "checkpoint": checkpoint.name, "vae": vae.name},
        "sampler": MAR_SAMPLER,
        SAMPLING: published(f"mar-{size}").recorded(),
    }

    with staged_folder(out) as folder:
        write_tokenizer(folder, KL16, latents, decoder, {}, store)
        write_model(folder, MASKED, config, network, notes, store=store)
    averaged = {"model_ema": "averaged weights", "model": "weights without averaging"}.get(wrapper, "weights as given")
    return (
        f"MAR-{size} ({config.classes} classes, {averaged}) with KL-{latents.downsample}, "
        f"{latents.image_size} x {latents.image_size} pixels, {config.length} tokens, weights as "
        f"{types_in({**network, **decoder}, store)}: {out}{note_on_doubles(names)}"
    )


def recognise_mar(state: Mapping[str, Tensor], source: Path) -> tuple[str, MARConfig]:
    """(published size, config) of a MAR state; every key and shape is checked, no number is read.

    Raises UsageError for a shape that no published size has, for missing, unexpected or misshapen keys, and for places
    that are no square grid.
    """
    with telling_keys(source):
        dim, token_dim = state["z_proj.weight"].shape
        places, length = (state[f"{part}_pos_embed_learned"].shape[1] for part in ("encoder", "diffusion"))
        classes, head_width = (state[k].shape[0] for k in ("class_emb.weight", "diffloss.net.input_proj.weight"))
    depth, head_depth = (numbered(state, before) for before in ("encoder_blocks.", "diffloss.net.res_blocks."))
    size = published_size(SHAPES, dim, depth, source, "blocks")
    grid = math.isqrt(length)
    if grid * grid != length or not 0 < length < places:
        raise UsageError(
            f"{source}: {length} tokens in {places} places are not allowed: a square grid of tokens, and at least one "
            "place before it for the class"
        )
    config = MARConfig(
        dim=dim,
        depth=depth,
        heads=SHAPES[size][2],
        head_width=head_width,
        head_depth=head_depth,
        token_dim=token_dim,
        grid=grid,
        classes=classes,
        buffer=places - length,
    )
    check_fit(on_meta(lambda: mar.MAR(config)).state_dict(), state, source)
    return size, config


def _latents_config(state: Mapping[str, Tensor], source: Path, grid: int) -> KL16Config:
    """The config of a published autoencoder for a grid of tokens, every key and shape checked."""
    with telling_keys(source):
        config = kl16.infer_config(state, grid)
    wanted = on_meta(lambda: kl16.kl16_autoencoder(config)).state_dict()
    check_fit(kl16.to_published(wanted, len(config.widths)), state, source)
    return config
