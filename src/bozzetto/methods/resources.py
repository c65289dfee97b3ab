"""What belongs to a loaded target besides itself: its drafters, and the table of its codes' neighbours."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bozzetto.checkpoints.folders import (
    FLOW,
    LLAMAGEN,
    MASKED,
    SKETCH,
    TOKENIZER_WEIGHTS,
    load_drafter,
    load_target,
    target_digest,
)
from bozzetto.checkpoints.weights import WEIGHTS
from bozzetto.common.files import digest
from bozzetto.common.hub import fetched
from bozzetto.drafters.base import DraftModel
from bozzetto.drafters.drift import CachedDrift
from bozzetto.drafters.gaussian import CachedGaussian
from bozzetto.drafters.small_target import SmallTarget
from bozzetto.drafters.trained import TRAINED
from bozzetto.errors import UsageError, require
from bozzetto.methods.options import Drafting
from bozzetto.rules.neighbours import MOST, nearest_codes
from bozzetto.runtime.graphs import digest_of
from bozzetto.runtime.kept import cache_folder, find, keep
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from bozzetto.targets.mar import MAR
from bozzetto.targets.mar_target import MARSampler, MARTarget

DRAFT = "draft"  # the folder of a masked model's own draft model, inside its own


class Resources:
    """Makes drafters for one target. folder: the model's, if it has one; codebook: float [V, d]."""

    def __init__(self, target: LlamaGenTarget, codebook: Tensor, folder: Path | None):
        self.target, self.codebook, self.folder = target, codebook, folder
        self._net = functools.cache(self._load_net)
        self._trained = functools.cache(self._load_trained)
        self._smaller = functools.cache(self._load_smaller)
        self.of = functools.cache(self._of)
        self._table: Tensor | None = None

    def _of(self, target: Any) -> Resources:
        """The same for another form of the target."""
        if target is self.target:
            return self
        return type(self)(target, self.codebook, self.folder)

    def trained(self, name: str, folder: str) -> DraftModel:
        """The trained drafter of this kind in `folder`, or the model's own. Raises UsageError where there is none, or
        where it was trained for another target."""
        return copy.copy(self._trained(name, str(self.trained_folder(name, folder))))

    def trained_folder(self, name: str, folder: str) -> Path:
        """Where the drafter lies: in a folder, or under a name on the hub."""
        if folder:
            return fetched(folder)
        if self.folder is None or not (self.folder / name).is_dir():
            where = "this model" if self.folder is None else self.folder
            raise UsageError(f"{where} comes without a trained drafter (write {name}:folder=DIR, or train one)")
        return self.folder / name

    def _load_net(self, name: str, folder: str) -> Any:
        weights = "" if self.folder is None else target_digest(self.folder)
        return load_drafter(folder, name, self.target.config, weights).to(self.target.device)

    def _load_trained(self, name: str, folder: str) -> Any:
        return TRAINED[name].cached(self._load_net(name, folder), self.target)

    def filler(self, drafter: Any) -> Any:
        """What draws the places that enter a window of fused steps; None for a drafter that has none. Raises as
        `trained`."""
        if not drafter.trained:
            return None
        net = self._net(drafter.trained, str(self.trained_folder(drafter.trained, drafter.folder)))
        return TRAINED[drafter.trained].fused(net, self.target.embedding, self.target.output, drafter.fresh)

    def smaller(self, folder: str) -> DraftModel:
        """A smaller target as drafter. Raises UsageError where its tokens are not this target's."""
        return SmallTarget(self._smaller(str(fetched(folder)) if folder else folder))

    def _load_smaller(self, folder: str) -> LlamaGenTarget:
        want, device = self.target.config, self.target.device
        small = load_target(folder, LLAMAGEN, dtype=self.target.dtype, device=device)
        for name in ("vocab", "grid", "classes"):
            have = getattr(small.config, name)
            if have != getattr(want, name):
                raise UsageError(f"{folder}: {name} = {have}, the target has {getattr(want, name)}")
        theirs, ours = Path(folder) / TOKENIZER_WEIGHTS, self.folder and self.folder / TOKENIZER_WEIGHTS
        if ours and theirs.is_file() and digest(theirs) != digest(ours):
            raise UsageError(f"{folder}: another tokenizer than the target's, so that its tokens mean other things")
        return LlamaGenTarget(small, self.target.dtype)

    def neighbours(self, columns: int) -> Tensor:
        """The nearest codes, int [V, columns] on the target's device. Raises UsageError for more columns than there
        are other codes."""
        most = min(MOST, len(self.codebook) - 1)
        require(columns <= most, "k", columns, f"at most {most} (the codebook has {len(self.codebook)} codes)")
        if self._table is None:
            self._table = self._all_neighbours(most).to(self.target.device)
        return self._table[:, :columns]

    def _all_neighbours(self, most: int) -> Tensor:
        return kept_neighbours(self.codebook, most)

    def weights(self, drafter: Drafting) -> Path | None:
        """The file of weights that a drafter reads, None for those without. Raises as `trained`."""
        if drafter.smaller:
            return fetched(drafter.folder) / WEIGHTS
        return self.trained_folder(drafter.trained, drafter.folder) / WEIGHTS if drafter.trained else None


class VectorResources:
    """The same for a causal target of continuous tokens. name: the model's; base: folder of the model that a drift
    variant is one of; tuned: whether the variant changed the body that the base model's drafter was trained for."""

    def __init__(self, target: Any, name: str, folder: Path | None, base: Path | None = None, tuned: bool = False):
        self.target, self.name, self.folder, self.base, self.tuned = target, name, folder, base, tuned
        self._draft_model = functools.cache(self._load)
        self.of = functools.cache(self._of)

    def _of(self, target: Any) -> VectorResources:
        """The same for another form of the target."""
        if target is self.target:
            return self
        return type(self)(target, self.name, self.folder, self.base, self.tuned)

    def trained_folder(self, folder: str) -> Path:
        """Where the trained drafter lies: in a folder, or under a name on the hub; "": the model's own, else its base
        model's. Raises UsageError where there is none."""
        if folder:
            return fetched(folder)
        for own in (self.folder, self.base):
            if own is not None and (own / SKETCH).is_dir():
                return own / SKETCH
        raise UsageError(f"{self.name} comes without a trained drafter (write {SKETCH}:folder=DIR, or train one)")

    def trained(self, name: str, folder: str) -> CachedGaussian:
        """The trained drafter. Raises UsageError as `trained_folder`, and where it was trained for another target."""
        return self._draft_model(self.trained_folder(folder))

    def _load(self, folder: Path) -> CachedGaussian:
        if self.tuned:
            raise UsageError(f"drafter {SKETCH!r} is not allowed here: {self.name} changed the body it was trained for")
        own = self.base or self.folder
        net = load_drafter(folder, SKETCH, self.target.whole, "" if own is None else target_digest(own))
        return (CachedDrift if self.base else CachedGaussian)(net.to(self.target.device), self.target.embedding)

    def weights(self, drafter: Drafting) -> Path | None:
        """As of `Resources`."""
        return self.trained_folder(drafter.folder) / WEIGHTS if drafter.trained else None


class MaskedResources:
    """The same for a masked target: smaller models of the same tokens."""

    def __init__(self, target: MARTarget, name: str, folder: Path):
        self.target, self.name, self.folder = target, name, folder
        self._whole = functools.cache(self._load)
        self.target_with = functools.cache(self._make)

    def smaller(self, folder: str) -> Path:
        """Where a smaller model lies; "": the one that comes with the model. Raises UsageError where there is none."""
        if folder:
            return fetched(folder)
        if not (self.folder / DRAFT).is_dir():
            raise UsageError(f"{self.name} comes without a smaller model (write model:folder=DIR)")
        return self.folder / DRAFT

    def weights(self, drafter: Drafting) -> Path | None:
        """As of `Resources`."""
        return self.smaller(drafter.folder) / WEIGHTS if drafter.smaller else None

    def _make(self, sampler: MARSampler, mode: str = "off", folder: Path | None = None) -> MARTarget:
        """The model (None) or a smaller one with a sampler, its head run as asked. Each is made once, and those of
        one folder share its weights. Raises UsageError for a smaller one of another family."""
        whole = self._whole(mode, folder)
        return whole if sampler == whole.sampler else whole.with_sampler(sampler)

    def _load(self, mode: str, folder: Path | None) -> MARTarget:
        """With the target's own sampler."""
        if mode != "off":
            return self._whole("off", folder).owned(self._network(folder or self.folder))
        if folder is None:
            return self.target
        return MARTarget(self._network(folder), self.target.sampler, self.target.dtype)

    def _network(self, folder: Path) -> MAR:
        network = load_target(folder, FLOW, MASKED, dtype=self.target.dtype, device=self.target.device)
        if not isinstance(network, MAR):
            raise UsageError(f"{folder}: a draft model of a masked target is masked too (family 'mar')")
        return network


def kept_neighbours(codebook: Tensor, k: int) -> Tensor:
    """`nearest_codes`, kept from one run to the next where there is a folder for that."""
    content = hashlib.sha256(codebook.detach().float().cpu().contiguous().numpy().data).hexdigest()
    name = f"neighbours-{digest_of(content, tuple(codebook.shape), str(codebook.device), k)}.safetensors"
    folder = cache_folder()
    if path := find(name, folder):
        with contextlib.suppress(OSError, SafetensorError):  # another process threw it away
            return load_file(path)["nearest"].clone()  # what is loaded is mapped, and the file may change
    table = nearest_codes(codebook, k).cpu().contiguous()
    # safetensors 0.8 reports a full disk as a SafetensorError, not as an OSError.
    with contextlib.suppress(OSError, SafetensorError):
        keep(name, lambda at: save_file({"nearest": table}, at), folder)
    return table
