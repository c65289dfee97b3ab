"""What is not asked for is the model's own: the published numbers of every known family, where they are looked up, and
that they arrive wherever images are drawn."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import bozzetto
import hf_toys
from bozzetto import GenerateSettings, UsageError
from bozzetto.adapters.spec import SHIPPED, read_spec, shipped
from bozzetto.checkpoints.own_sampling import OwnSampling, own_from, sampling_line, with_stated
from bozzetto.checkpoints.published import PUBLISHED, STATED, published
from bozzetto.cli.main import main
from bozzetto.evaluate.sampling import SampleRun, own_for
from test_hosted import EMU3_SIZE, write_chameleon, write_emu3, write_janus

QUALITY = " masterpiece, film grained, best quality."
POOR = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
# (guidance, temperature, top-k, top-p, what else), as read in these public files; a temperature of 1 and no top-p are
# the defaults of the commands that say nothing of them.
TABLE: dict[str, tuple[float, float, int, float, dict[str, Any]]] = {
    # deepseek-ai/Janus, generation_inference.py: cfg_weight 5, temperature 1; the published conversion writes
    # guidance_scale 5 into generation_config.json (transformers, convert_janus_weights_to_hf.py)
    "janus": (5, 1, 0, 1, {}),
    # baaivision/Emu3, image_generation.py: classifier_free_guidance 3.0, top_k 2048, POSITIVE_PROMPT, NEGATIVE_PROMPT
    "emu3": (3, 1, 2048, 1, {"suffix": QUALITY, "negative_prompt": POOR}),
    # GAIR-NLP/anole, chameleon/inference/chameleon.py (Meta's): guidance_scale_text 3.0, temp 0.7, top_p 0.9
    "chameleon": (3, 0.7, 0, 0.9, {}),
    # Alpha-VLLM/Lumina-mGPT, README.md: cfg 4.0, image_top_k 2000, temperature 1.0
    "lumina-mgpt": (4, 1, 2000, 1, {}),
    # Alpha-VLLM/Lumina-mGPT-2.0, README.md: --cfg 4.0 --top_k 4096 --temperature 1.0
    "lumina-mgpt-2": (4, 1, 4096, 1, {}),
    # wdrink/SimpleAR by way of addisonwu05/llm-polysemy, gen_simplear.py ("repo defaults"): cfg_scale 6.0, top_k 64000,
    # which are all codes
    "simplear": (6, 1, 0, 1, {}),
    # zai-org/GLM-Image, README.md, note: do_sample, temperature 0.9, topp 0.75; tokens without guidance
    "glm-image": (1, 0.9, 0, 0.75, {}),
    # stepfun-ai/NextStep-1-Large and -1.1, model pages' call of generate_image: cfg 7.5, constant, 28 steps, no norm;
    # the positive prompt of 1.1 is empty. (The repository's first README: 50 steps, a norm.)
    "nextstep-1": (7.5, 1, 0, 1, {"steps": 28, "suffix": QUALITY, "negative_prompt": POOR}),
    "nextstep-1.1": (7.5, 1, 0, 1, {"steps": 28, "negative_prompt": POOR}),
    # FoundationVision/LlamaGen, GETTING_STARTED.md: --cfg-scale by size; sample_c2i_ddp.py: top-k 0
    "llamagen-c2i-B": (2, 1, 0, 1, {}),
    "llamagen-c2i-L": (2, 1, 0, 1, {}),
    "llamagen-c2i-XL": (1.75, 1, 0, 1, {}),
    "llamagen-c2i-XXL": (1.75, 1, 0, 1, {}),
    "llamagen-c2i-3B": (1.65, 1, 0, 1, {}),
    # FoundationVision/LlamaGen, autoregressive/sample/sample_t2i.py: --cfg-scale 7.5 --top-k 1000
    "llamagen-t2i": (7.5, 1, 1000, 1, {}),
    # LTH14/mar, README.md, evaluation: --cfg --cfg_schedule linear --num_iter 256 --num_sampling_steps 100
    "mar-B": (2.9, 1, 0, 1, {"steps": 100, "passes": 256, "guidance_schedule": "linear"}),
    "mar-L": (3, 1, 0, 1, {"steps": 100, "passes": 256, "guidance_schedule": "linear"}),
    "mar-H": (3.2, 1, 0, 1, {"steps": 100, "passes": 256, "guidance_schedule": "linear"}),
}


def known(family: str) -> OwnSampling:
    return read_spec(SHIPPED / f"{family}.yaml").sampling if family in shipped() else published(family)


@pytest.mark.parametrize("family", TABLE)
def test_the_numbers_are_the_published_ones(family: str) -> None:
    *law, rest = TABLE[family]
    wanted = asdict(OwnSampling(*law, **rest, source=known(family).source))
    assert asdict(known(family)) == wanted and wanted["source"] != OwnSampling().source
    line = sampling_line({**wanted, "asked": [], "suffix": "", "negative_prompt": ""})
    assert f"guidance {law[0]:g}" in line and f"temperature {law[1]:g}" in line and wanted["source"] in line
    assert own_from({"sampling": known(family).recorded()}, Path("config.json")) == known(family)


def test_the_table_of_this_file_knows_every_family() -> None:
    assert set(TABLE) == {*PUBLISHED, *shipped()} and set(STATED) <= set(PUBLISHED)
    assert published("something else") == OwnSampling(2.0, 1.0, 0, 1.0)


BAD = {
    "guidance": (0.5, "guidance = 0.5"),
    "temperature": (-1, "temperature = -1"),
    "top_k": (2.5, "top_k = 2.5"),
    "top_p": (0, "top_p = 0"),
    "steps": (-1, "steps = -1"),
    "passes": ("64", "passes = '64'"),
    "guidance_schedule": ("cosine", "guidance_schedule = 'cosine'"),
    "suffix": ("two\nlines", "suffix = "),
    "negative_prompt": (["ugly"], "negative_prompt = "),
    "cfg": (3, "unknown config key 'cfg'"),
}


@pytest.mark.parametrize("key", BAD)
def test_a_bad_number_in_a_config_is_named_with_its_file(tiny_model: Path, tmp_path: Path, key: str) -> None:
    folder = with_sampling(tiny_model, tmp_path, {key: BAD[key][0]})
    with pytest.raises(UsageError) as caught:
        bozzetto.load(folder)
    assert f"{folder / 'config.json'}: sampling: " in str(caught.value) and BAD[key][1] in str(caught.value)


@pytest.mark.parametrize("said", [None, 3, [2.0], "own"])
def test_sampling_is_a_mapping(tiny_model: Path, tmp_path: Path, said: Any) -> None:
    with pytest.raises(UsageError, match="sampling must be a mapping"):
        bozzetto.load(with_sampling(tiny_model, tmp_path, said))


def test_steps_are_not_for_codes(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_sampling(tiny_model, tmp_path, {"steps": 5})
    with pytest.raises(UsageError, match=r"config\.json: steps is not allowed here"):
        bozzetto.load(folder)


def with_sampling(model: Path, where: Path, said: Any) -> Path:
    folder = where / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sampling": said}))
    return folder


OWN = {"guidance": 3.5, "temperature": 0.8, "top_k": 7, "top_p": 0.9}


def test_what_is_asked_for_wins_and_the_rest_is_the_models(tiny_model: Path, tmp_path: Path) -> None:
    pipe = bozzetto.load(with_sampling(tiny_model, tmp_path, OWN))
    assert {k: getattr(pipe.resolve(GenerateSettings()), k) for k in OWN} == OWN
    off = GenerateSettings(guidance=1.0, top_k=0, top_p=1.0)
    found = pipe.resolve(off)
    assert (found.guidance, found.temperature, found.top_k, found.top_p) == (1.0, 0.8, 0, 1.0)
    assert pipe.resolve(found) == found and pipe.sampling(off)["asked"] == ["guidance", "top_k", "top_p"]
    one, two = pipe.generate(["rose"], seed=3), pipe.generate(["rose"], seed=3, **OWN)
    assert one.images[0].sha256 == two.images[0].sha256
    assert one.images[0].sha256 != bozzetto.load(tiny_model).generate(["rose"], seed=3).images[0].sha256


def test_unresolved_settings_have_no_law() -> None:
    with pytest.raises(ValueError, match="temperature, top_k, top_p: not set"):
        GenerateSettings(guidance=2.0).law  # noqa: B018
    assert GenerateSettings().with_own(OwnSampling()).law.guidance == 2.0


def test_a_folder_without_published_settings_draws_as_before(tiny_model: Path) -> None:
    pipe = bozzetto.load(tiny_model)
    plain = pipe.generate(["rose"], seed=3, guidance=2.0, temperature=1.0, top_k=0, top_p=1.0, negative_prompt="")
    assert pipe.generate(["rose"], seed=3).images[0].sha256 == plain.images[0].sha256
    assert pipe.generate(["rose"]).settings.negative_prompt == ""


def test_a_sample_folder_of_an_earlier_version_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    pipe = bozzetto.load(with_sampling(tiny_model, tmp_path, OWN))
    settings = GenerateSettings("none", "seed-exact", batch=2)
    run = SampleRun(tmp_path / "run", pipe, settings)
    run.claim()
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["sampling"]["guidance"] == written["settings"]["guidance"] == 3.5
    # As it was written while unset values were the same for all models.
    del written["sampling"]
    written["settings"] |= {"guidance": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    (tmp_path / "run" / "run.json").write_text(json.dumps(written))
    again = SampleRun(tmp_path / "run", pipe, settings)
    assert again.settings.guidance == again.sampling["guidance"] == 2.0 and again.sampling["asked"] == []
    assert own_for(pipe, [tmp_path / "run", tmp_path / "none"]).guidance == 2.0  # of all methods in one comparison
    assert own_for(pipe, [tmp_path / "none"]) == pipe.own
    with pytest.raises(UsageError, match=r"guidance = 2.0 there, 4.0 asked"):
        SampleRun(tmp_path / "run", pipe, replace(settings, guidance=4.0))


def test_bench_evaluate_and_profile_record_the_models_numbers(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_sampling(tiny_model, tmp_path, OWN)
    for verb in (["bench", "--methods", "none", "--count", "1", "--rounds", "1"], ["profile", "--seconds", "0.01"]):
        assert main([*verb, "--model", str(folder), "--json", str(tmp_path / "report.json")]) == 0
        told = json.loads((tmp_path / "report.json").read_text())
        settings = told["settings"]
        assert settings.get("guidance", settings.get("guidances")) in (3.5, [3.5])
        assert (settings["temperature"], settings["top_p"]) == (0.8, 0.9)
        assert settings.get("top_k", settings.get("top_ks")) in (7, [7])
    rows = ["bench", "--guidance", "own,1", "--top-k", "0", "--methods", "none", "--count", "1", "--rounds", "1"]
    assert main([*rows, "--model", str(folder), "--json", str(tmp_path / "two.json")]) == 0
    results = json.loads((tmp_path / "two.json").read_text())["results"]
    assert {(row["guidance"], row["top_k"]) for row in results} == {(3.5, 0), (1.0, 0)}


def test_null_in_a_file_of_options_is_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_sampling(tiny_model, tmp_path, OWN)
    (tmp_path / "options.yaml").write_text("guidance: null\ntop_k: 0\nnegative_prompt: null\n")
    out = tmp_path / "out"
    words = ["generate", "rose", "--model", str(folder), "--config", str(tmp_path / "options.yaml"), "--out", str(out)]
    assert main(words) == 0
    told = json.loads((out / "manifest.json").read_text())["sampling"]
    assert (told["guidance"], told["top_k"], told["asked"]) == (3.5, 0, ["top_k"])


# ---- checkpoints in the Hugging Face layout


def hosted(folder: Path, write: Any, said: dict[str, Any] | None = None, **options: Any) -> Any:
    folder.mkdir()
    write(folder)
    if said is not None:
        file = folder / "generation_config.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**known, **said}))
    return bozzetto.load(folder, **options)


def test_a_generation_config_is_read_for_what_it_says_of_pictures(tmp_path: Path) -> None:
    # Text settings, as Qwen and Llama checkpoints carry them; transformers adds top_k 50 where nothing is said.
    text = {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20}
    janus = {"bos_token_id": hf_toys.BEGIN, "pad_token_id": hf_toys.PADDING}
    janus["generation_kwargs"] = {"boi_token_id": hf_toys.IMAGE}  # type: ignore[assignment]
    pipe = hosted(tmp_path / "janus", write_janus, {**janus, **text, "guidance_scale": 6})
    assert replace(pipe.own, source="") == OwnSampling(6.0, source="")
    assert pipe.own.source.startswith("generation_config.json: guidance_scale; ")
    pipe = hosted(tmp_path / "chameleon", write_chameleon, text)
    assert pipe.own == published("chameleon")
    pipe = hosted(tmp_path / "emu3", write_emu3, {"top_k": 4, "do_sample": False}, image_size=EMU3_SIZE)
    assert (pipe.own.guidance, pipe.own.temperature, pipe.own.top_k) == (3.0, 1.0, 4)


def test_a_bad_generation_config_is_named(tmp_path: Path) -> None:
    for said, named in (({"guidance_scale": "5"}, "guidance = '5'"), ({"top_p": 7}, "top_p = 7")):
        with pytest.raises(UsageError, match=named):
            with_stated(OwnSampling(), STATED["emu3"], said, Path("generation_config.json"))


def test_quality_words_are_asked_for_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The toy's context has no room for the published ones.
    short = OwnSampling(3.0, top_k=20, suffix=" white.", negative_prompt="ugly old")
    monkeypatch.setattr("bozzetto.adapters.source.sampling_of", lambda family, folder: short)
    pipe = hosted(tmp_path / "emu3", write_emu3, image_size=EMU3_SIZE)
    plain, more = pipe.generate(["a dog"]), pipe.generate(["a dog"], quality_words=True)
    assert (plain.images[0].class_name, plain.images[0].prompt) == ("a dog", "a dog")
    assert (more.images[0].class_name, more.images[0].prompt) == ("a dog", "a dog white.")
    assert (plain.settings.negative_prompt, more.settings.negative_prompt) == ("", "ugly old")
    typed = pipe.generate(["a dog white."], negative_prompt="ugly old")
    assert typed.images[0].sha256 == more.images[0].sha256 != plain.images[0].sha256
    assert pipe.generate(["a dog"], quality_words=True, negative_prompt="").settings.negative_prompt == ""
    words = ["generate", "a dog", "--model", str(tmp_path / "emu3"), "--image-size", str(EMU3_SIZE)]
    assert main([*words, "--quality-words", "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["images"][0]["class"] == "a dog" and told["images"][0]["prompt"] == "a dog white."
    assert (told["sampling"]["suffix"], told["sampling"]["negative_prompt"]) == (" white.", "ugly old")


def test_quality_words_that_nobody_published_are_refused(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="quality_words is not allowed here"):
        bozzetto.load(tiny_model).generate(["rose"], quality_words=True)


def test_a_list_of_models_says_how_they_are_sampled(tiny_model: Path, tmp_path: Path) -> None:
    from bozzetto.cli.listing import list_models

    with_sampling(tiny_model, tmp_path, OWN)
    for family, said in {"janus": {"guidance_scale": 6, "top_k": 50}, "chameleon": {}, "emu3": {}}.items():
        (tmp_path / family).mkdir()
        (tmp_path / family / "config.json").write_text(json.dumps({"model_type": family}))
        (tmp_path / family / "generation_config.json").write_text(json.dumps(said))
    lumina = {"model_type": "chameleon", "architectures": ["ChameleonXLLMXForConditionalGeneration"]}
    (tmp_path / "lumina").mkdir()
    (tmp_path / "lumina" / "config.json").write_text(json.dumps(lumina))
    told = {line.split()[0]: line for line in list_models(tmp_path).splitlines()[1:]}
    assert "guidance 3.5, temperature 0.8, top-k 7, top-p 0.9" in told["tiny"]
    assert "  guidance 6  " in told["janus"] and "guidance 3, top-k 2048" in told["emu3"]
    assert "guidance 3, temperature 0.7, top-p 0.9" in told["chameleon"]
    assert "guidance 4, top-k 2000" in told["lumina"]
    assert "  guidance 2  " in next(line for line in list_models(None).splitlines() if line.startswith("flowers "))
