"""The trained drafter of continuous tokens: its network, its chains, its folder, its training, and the verbs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import bozzetto
from bozzetto import UsageError
from bozzetto.checkpoints.folders import CONFIG, load_drafter, save_drafter
from bozzetto.checkpoints.weights import WEIGHTS
from bozzetto.cli.main import main
from bozzetto.decoding.loop import EagerBatch
from bozzetto.drafters.base import Observation, Start
from bozzetto.drafters.gaussian import CachedGaussian, GaussianConfig, GaussianDrafter, GaussianNet, gaussian_config
from bozzetto.drafts import VECTORS, Verdict
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.chain import Trajectory, sample_trajectory
from bozzetto.laws.gaussian import AffineChain, gaussian_chain
from bozzetto.laws.noise import NormalField, image_keys
from bozzetto.methods.table import read_drafter
from bozzetto.runtime.dense import Dense
from bozzetto.targets.flow import FlowConfig, FlowModel
from bozzetto.targets.flow_cache import FlowSampler, FlowTarget
from bozzetto.train.families import read_recipe, train
from bozzetto.train.gaussian import GaussianFit
from bozzetto.train.recipes import DataSource, SketchRecipe
from path_toys import compare, token_of
from toys import make_rule

SCHEDULE = FlowSampler(steps=5).schedule
CPU = torch.device("cpu")


def random_sketch(config: GaussianConfig, seed: int = 0) -> GaussianNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = GaussianNet(config)
        for name, weight in net.named_parameters():
            if weight.ndim > 1 or "bias" in name:
                torch.nn.init.normal_(weight, std=0.2)
        torch.nn.init.orthogonal_(net.basis)
    return net.eval().requires_grad_(False)


def small_target(grid: int = 2, token_dim: int = 3) -> FlowTarget:
    """Of few and noisy steps, so that a drafter that knows nothing is right now and then."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shape = {"token_dim": token_dim, "grid": grid, "classes": 2, "head_width": 16, "head_depth": 1}
        model = FlowModel(FlowConfig(16, 1, 2, ffn_multiple=8, **shape))
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.15)
    return FlowTarget(model.eval().requires_grad_(False), FlowSampler(steps=3, last_std=0.6))


def sketcher_for(target: FlowTarget) -> CachedGaussian:
    c = target.config
    return CachedGaussian(
        random_sketch(GaussianConfig(c.dim, c.heads, c.ffn, target.token_dim, c.grid, 16)), target.embedding
    )


@pytest.fixture(scope="module")
def flow(tiny_flow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a random drafter."""
    folder = Path(shutil.copytree(tiny_flow, tmp_path_factory.mktemp("with") / "sketch"))
    pipe = bozzetto.load(folder)
    save_drafter(
        folder / "sketch",
        random_sketch(gaussian_config(pipe.target.whole)),
        folder,
        {"target_name": "tiny"},
        compact=True,
    )
    return folder


def affine_chain(rows: int = 4, dim: int = 3) -> AffineChain:
    torch.manual_seed(0)
    gain, offset = torch.rand(5, rows, dim), torch.randn(5, rows, dim)
    basis = torch.linalg.qr(torch.randn(dim, dim)).Q
    return AffineChain(gain, offset, SCHEDULE.ancestry(CPU), SCHEDULE.std.float(), (rows, 1), basis)


def test_sampling_an_affine_chain_at_once_is_running_it_step_by_step() -> None:
    law, noise = affine_chain(), torch.randn(4, 6, 3)
    for one, other in zip(law.sample(noise), sample_trajectory(law, None, noise), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_step_for_all_places_is_the_step_for_each() -> None:
    law, x = affine_chain(), torch.randn(4, 3)
    for step in range(5):
        whole = law.all_places(x, step)
        place = torch.tensor([2, 0])
        some = law.kernel(x[place], torch.full_like(place, step), place)
        torch.testing.assert_close(some.mean, whole.mean[place])
        torch.testing.assert_close(some.std, whole.std[place])


def test_a_gaussian_chain_predicts_the_posterior_mean_of_its_token() -> None:
    centre, spread = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.8, 1.7]])
    law = gaussian_chain(centre, spread, SCHEDULE.ancestry(CPU), SCHEDULE.std.float(), (1, 1))
    x, place = torch.randn(1, 2), torch.tensor([0])
    for step in range(1, 5):
        t = SCHEDULE.time[step].item()
        precision = 1 / spread**2 + t**2 / (1 - t) ** 2  # Bayes' rule for x = t token + (1 - t) noise
        wanted = (centre / spread**2 + t * x / (1 - t) ** 2) / precision
        mean = law.kernel(x, torch.tensor([step]), place).mean
        torch.testing.assert_close(token_of(law.ancestry, mean, x, torch.tensor([step])), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_the_cached_drafter_predicts_what_the_roll_out_of_training_does(guidance: float) -> None:
    target = small_target(grid=3)
    sketcher = sketcher_for(target)
    net = random_sketch(GaussianConfig(16, 2, target.config.ffn, 3, 3, 16))
    copies, n = (2 if guidance != 1 else 1), 5
    torch.manual_seed(2)
    features, tokens = torch.randn(2 * copies, n, 16), torch.randn(2, n, 3)
    rolled = net.body.roll_out(features, sketcher.embed(tokens).repeat(copies, 1, 1), 1)[0]
    drafter = GaussianDrafter(sketcher, 2, SCHEDULE.ancestry(CPU), SCHEDULE.std.float(), 3)
    labels, keys = torch.tensor([0, 1]), image_keys(0, 2, torch.arange(2))
    noise = NormalField(0, torch.arange(2), 9, 5, 3)
    drafter.begin(Start(labels, 9, LawSettings(guidance=guidance), noise, keys, with_laws=True))
    everything = torch.full((2,), n)
    seen = Observation(None, Verdict(tokens, everything - 1), everything, n, torch.zeros_like(everything), features)
    hidden = drafter.model.take_in(seen)
    torch.testing.assert_close(hidden[:, 0], rolled[:, -1], atol=1e-4, rtol=1e-4)
    for one, other in zip(sketcher.gaussian(hidden[:, 0]), net.gaussian(rolled[:, -1]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_drafted_paths_carry_the_laws_they_were_drawn_from(guidance: float) -> None:
    target, drafts = small_target(), []
    drafter = GaussianDrafter(sketcher_for(target), 3, target.schedule.ancestry(CPU), target.schedule.std.float(), 3)
    propose = drafter.propose

    def spy(batch: int, limit: int):  # type: ignore[no-untyped-def]
        drafts.append(propose(batch, limit))
        return drafts[-1]

    drafter.propose = spy  # type: ignore[method-assign]
    EagerBatch(target, drafter, make_rule("joint", VECTORS), LawSettings(guidance=guidance)).run(
        torch.tensor([0, 1, 1]), 4, torch.arange(3)
    )
    drafts = [d for d in drafts if d.length]
    assert drafts and max(d.length for d in drafts) == 3
    for draft in drafts:
        path = Trajectory(*(part.flatten(0, 1) for part in draft.trajectory))
        for step in range(3):
            law = draft.law.all_places(path.states[:, step], step)
            torch.testing.assert_close(law.mean, path.mean[:, step], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(law.std, path.std[:, step])
        z = (path.states[:, 1:] - path.mean) / path.std
        assert z.abs().max() < 6


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("rule", ["joint", "block", "chains"])
def test_images_of_exact_rules_have_the_law_of_the_sequential_sampler(rule: str, guidance: float) -> None:
    target, images, settings = small_target(), torch.arange(2000), LawSettings(guidance=guidance)
    labels = images % 2

    def tokens(drafter: str, rule: str, seed: int) -> torch.Tensor:
        made = read_drafter(drafter, VECTORS).make(
            1, None, SimpleNamespace(trained=lambda *_: sketcher_for(target)), target
        )
        result = EagerBatch(target, made, make_rule(rule, VECTORS), settings).run(labels, seed, images)
        if drafter != "none":
            assert 0 < result.accepted.sum() < result.drafted.sum()
        return result.tokens

    plain = tokens("none", "plain", 0)
    assert compare(tokens("sketch:length=2", rule, 1), plain).p_value > 1e-3


def test_the_drafter_gives_the_same_image_in_any_batch(flow: Path) -> None:
    pipe = bozzetto.load(flow)
    for rule in ("joint", "block", "chains", "pathwise:epsilon=1", "cspd"):
        options = {"seed": 3, "drafter": "sketch:length=3", "rule": rule}
        whole = pipe.generate(count=4, batch=4, **options).images
        for image in pipe.generate(indices=[3, 1], batch=1, **options).images:
            torch.testing.assert_close(image.tokens, whole[image.index].tokens, atol=2e-3, rtol=0)


def test_generate_names_the_drafter_it_used(flow: Path, tmp_path: Path) -> None:
    flags = ["generate", "--model", str(flow), "--drafter", "sketch", "--count", "2", "--out", str(tmp_path / "out")]
    assert main(flags) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["rule"] == "joint"
    assert manifest["head_calls"] > 0


@pytest.mark.parametrize(
    ("drafter", "rule", "named"),
    [
        ("sketch:length=0", "joint", ["length = 0", "1 to 64"]),
        ("sketch:folder=nowhere", "joint", ["nowhere"]),
        ("sketch", "plain", ["needs no drafter", "'none'"]),
        ("model", "joint", ["masked models", "jacobi, sketch"]),
    ],
)
def test_what_does_not_go_together_is_named(flow: Path, drafter: str, rule: str, named: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        bozzetto.load(flow).generate(count=1, drafter=drafter, rule=rule)
    assert all(part in str(error.value) for part in named)


def test_a_model_without_a_drafter_says_so(tiny_flow: Path) -> None:
    with pytest.raises(UsageError, match="comes without a trained drafter"):
        bozzetto.load(tiny_flow).generate(count=1, drafter="sketch", rule="joint")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("family", "eagle", "family is 'eagle'"),
        ("target_weights", "0" * 16, "another target"),
        ("config", {"token_dim": 16}, "token_dim = 16, the target has 32"),
    ],
)
def test_a_drafter_of_something_else_is_refused(
    flow: Path, tmp_path: Path, key: str, value: object, named: str
) -> None:
    folder = Path(shutil.copytree(flow / "sketch", tmp_path / "sketch"))
    content = json.loads((folder / CONFIG).read_text())
    content[key] = {**content[key], **value} if isinstance(value, dict) else value
    (folder / CONFIG).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=named):
        bozzetto.load(flow).generate(count=1, drafter=f"sketch:folder={folder}", rule="joint")


def test_a_stored_drafter_comes_back(flow: Path) -> None:
    pipe = bozzetto.load(flow)
    config = pipe.target.whole
    digest = json.loads((flow / "sketch" / CONFIG).read_text())["target_weights"]
    net, stored = random_sketch(gaussian_config(config)), load_drafter(flow / "sketch", "sketch", config, digest)
    for name, weight in net.state_dict().items():
        torch.testing.assert_close(stored.state_dict()[name], weight, atol=1e-2, rtol=1e-2)
    basis = CachedGaussian(stored, Dense(torch.randn(32, 32), None, torch.float32)).basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(32), atol=1e-6, rtol=0)


def recipe(out: Path, model: Path, blooms: Path, tiny_weights: Path, **changes: object) -> SketchRecipe:
    data = DataSource(str(blooms))
    shared = {"image_size": 32, "views": 2, "steps": 4, "batch": 2, "warmup": 2, "evaluate_every": 2, "test_images": 4}
    return SketchRecipe(
        family="sketch", out=str(out), model=str(model), tiny=str(tiny_weights), train=data, test=data,
        **{**shared, **changes},
    )  # fmt: skip


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    flow: Path, tmp_path: Path, blooms: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(recipe(tmp_path / "straight", flow, blooms, tiny_weights))
    stopped = recipe(tmp_path / "stopped", flow, blooms, tiny_weights)
    original, calls = GaussianFit.train_step, []

    def step(self):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(GaussianFit, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    resumed = train(stopped)
    assert (resumed / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()
    drawn = bozzetto.load(flow).generate(count=1, drafter=f"sketch:folder={resumed}", rule="joint")
    assert drawn.images[0].tokens.shape == (16, 32)


def test_training_brings_the_draft_closer_to_the_target(
    flow: Path, tmp_path: Path, blooms: Path, tiny_weights: Path
) -> None:
    train(recipe(tmp_path / "run", flow, blooms, tiny_weights, steps=60, evaluate_every=20, lr=3e-3))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["best"] < 0.8 * lines[0]["held_out"]


def test_features_alone_can_be_learnt_from_a_drafter_that_is_there(
    flow: Path, tmp_path: Path, blooms: Path, tiny_weights: Path
) -> None:
    begun = {"init": str(flow / "sketch"), "divergence_weight": 0.0, "feature_weight": 10.0}
    made = train(recipe(tmp_path / "run", flow, blooms, tiny_weights, steps=40, evaluate_every=20, lr=3e-3, **begun))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["best"] < 0.8 * lines[0]["held_out"]
    one, other = (load_file(folder / WEIGHTS) for folder in (made, flow / "sketch"))
    torch.testing.assert_close(one["readout.bias"], other["readout.bias"], atol=1e-2, rtol=0)  # but for its decay
    assert not torch.equal(one["body.fc.weight"], other["body.fc.weight"])


def test_the_loss_is_the_divergence_of_the_two_paths(
    flow: Path, tmp_path: Path, blooms: Path, tiny_weights: Path
) -> None:
    """V, summed over all steps, is twice the mean log ratio of the paths' densities given their states."""
    fit = GaussianFit(recipe(tmp_path / "run", flow, blooms, tiny_weights))
    with torch.no_grad():
        for parameter in fit.model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
        labels, tokens = fit.test_labels[:2], fit.test[:2]
        scale, noise = torch.tensor([1.0, 2.5]), torch.randn_like(tokens)
        steps = len(fit.times)
        total = torch.zeros(2, tokens.shape[1] - 1)
        for k in range(steps):
            at = torch.full(tokens.shape[:2], k)
            (part,) = fit.errors(1, labels, tokens, scale, at, noise)
            assert part.shape == total.shape and (part >= 0).all()
            total += part / steps
        guess = fit.errors(1, labels, tokens, scale, torch.zeros_like(at), noise)[0]
    assert torch.isfinite(total).all() and not torch.allclose(guess, total)


def test_the_recipe_names_its_family_and_refuses_unknown_keys(tmp_path: Path) -> None:
    text = yaml.safe_load(Path("recipes/flowers-flow-sketch.yaml").read_text())
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(text))
    assert isinstance(read_recipe(path, "drafter"), SketchRecipe)
    for change, named in (({"family": "owl"}, "family = 'owl'"), ({"speed": 1}, "unknown key 'speed'")):
        path.write_text(yaml.safe_dump({**text, **change}))
        with pytest.raises(UsageError, match=named):
            read_recipe(path, "drafter")


def test_a_drafter_of_codes_is_no_drafter_of_vectors(tiny_model: Path, tmp_path: Path, blooms: Path) -> None:
    wrong = replace(recipe(tmp_path / "run", tiny_model, blooms, tmp_path), model=str(tiny_model))
    with pytest.raises(UsageError, match="family is"):
        train(wrong)


def test_the_sketcher_computes_in_the_dtype_of_the_targets_embedding() -> None:
    embedding = Dense(torch.randn(16, 3), None, torch.bfloat16)
    assert CachedGaussian(random_sketch(GaussianConfig(16, 2, 24, 3, 2, 16)), embedding).dtype == torch.bfloat16
