"""Our loop inside transformers' generate: what is asked is followed, or refused by its name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.generation import (
    LogitsProcessor,
    MaxTimeCriteria,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import bozzetto
import hf_toys
from bozzetto.adapters.prompted import cache_argument
from bozzetto.decoding.loop import EagerBatch
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.pipeline.custom_generate import _batch
from bozzetto.settings import GenerateSettings
from hf_toys import GRID, NEGATIVE, PROMPTS
from toys import make_drafter, make_rule

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")  # transformers tells so what it will drop

LINES = GRID * (GRID + 1)  # tokens of an Emu3 picture


@functools.cache
def model_of(family: str) -> Any:
    return {"emu3": hf_toys.tiny_emu3, "chameleon": hf_toys.tiny_chameleon}[family]()


@functools.cache
def target_of(family: str) -> Any:
    return {"emu3": hf_toys.emu3, "chameleon": hf_toys.chameleon}[family]()


def draw(
    family: str = "chameleon", prompts: Any = PROMPTS[:1], ways: dict[str, Any] | None = None, **asked: Any
) -> Any:
    """generate with our loop. ways: of our loop."""
    ids = torch.tensor(prompts)
    loop = bozzetto.generate_fn(GRID, GRID, **(ways or {}))
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": LINES, **asked}
    return model_of(family).generate(ids, custom_generate=loop, **{k: v for k, v in given.items() if v is not None})


def wanted(family: str, label: int, law: LawSettings, index: int = 0) -> list[int]:
    """The words of a picture by our decoder."""
    decoder = EagerBatch(target_of(family), make_drafter("none"), make_rule("seed-exact"), law)
    tokens = decoder.run(torch.tensor([label]), 0, torch.tensor([index])).tokens[0]
    return torch.tensor(target_of(family).numbers)[tokens].tolist()


class Shown:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value)

    def end(self) -> None:
        self.ended = True


GLM = {"image_grid_thw": torch.tensor([[1, *grid] for grid in reversed(hf_toys.GRIDS)] * 3)}
GLM |= {"images_per_sample": torch.tensor([2, 2, 2])}


def glm(grids: tuple[int, int] = hf_toys.GRIDS[1], **asked: Any) -> Tensor:
    """Greedy tokens of GLM-Image for the padded prompts; with `custom_generate` given, by that."""
    longest = max(map(len, PROMPTS))
    ids, mask = (
        torch.tensor([[0] * (longest - len(p)) + row for p, row in zip(PROMPTS, rows, strict=True)])
        for rows in (PROMPTS, [[1] * len(p) for p in PROMPTS])
    )
    given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 9, **GLM, **asked}
    return glm_model().generate(ids, **{k: v for k, v in given.items() if v is not None})


@functools.cache
def glm_model() -> Any:
    return hf_toys.tiny_glm()


@pytest.mark.parametrize("drafter", ["none", "jacobi"])
def test_glm_image_draws_what_generate_draws(drafter: str) -> None:
    loop = bozzetto.generate_fn(*hf_toys.GRIDS[1], drafter=drafter)
    assert torch.equal(glm(custom_generate=loop), glm())
    # what its generation_config asks for: as many words as there are, of which some are no image tokens
    law: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_p": 0.75, "top_k": hf_toys.CODES + 4}
    slow = bozzetto.generate_fn(*hf_toys.GRIDS[1], drafter="none")
    assert torch.equal(glm(custom_generate=loop, **law), glm(custom_generate=slow, **law))


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"image_grid_thw": None}, "image_grid_thw = None .* all that the processor returns"),
        ({"image_grid_thw": GLM["image_grid_thw"][:3]}, "two grids for each prompt"),
        ({"images_per_sample": torch.tensor([3, 2, 1])}, "two grids for each prompt"),
        ({"image_grid_thw": GLM["image_grid_thw"] + 1}, "pictures of 1 x 2 x 3 are"),
        ({"guidance_scale": 2.0}, "guidance_scale = 2.0 .* nothing of its grids"),
    ],
)
def test_glm_image_refuses_other_grids(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        glm(custom_generate=bozzetto.generate_fn(*hf_toys.GRIDS[1]), **asked)


def never(ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
    return torch.zeros(len(ids), dtype=torch.bool)


class Never(StoppingCriteria):
    __call__ = staticmethod(never)  # type: ignore[assignment]


class Same(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("num_beams = 2", {"num_beams": 2}),
    ("max_new_tokens = 5 .*takes 9 tokens", {"max_new_tokens": 5}),
    ("max_length = 8", {"max_new_tokens": None, "max_length": 8}),
    ("min_length = 99", {"min_length": 99, "max_new_tokens": 100}),
    ("stopping_criteria = Never", {"stopping_criteria": [Never()]}),
    ("stopping_criteria = MaxTimeCriteria", {"stopping_criteria": [MaxTimeCriteria(100.0)]}),
    ("max_time = 9.5", {"max_time": 9.5}),
    ("eos_token_id = 24 .*an image token", {"eos_token_id": 24}),
    ("repetition_penalty = 1.5", {"repetition_penalty": 1.5}),
    ("no_repeat_ngram_size = 2", {"no_repeat_ngram_size": 2}),
    ("bad_words_ids", {"bad_words_ids": [[25]]}),
    ("suppress_tokens", {"suppress_tokens": [25]}),
    ("begin_suppress_tokens", {"begin_suppress_tokens": [25]}),
    ("sequence_bias", {"sequence_bias": [[[25], 1.0]]}),
    ("forced_eos_token_id = 25", {"forced_eos_token_id": 25}),
    ("exponential_decay_length_penalty", {"exponential_decay_length_penalty": (3, 1.1)}),
    ("min_p = 0.1", {"do_sample": True, "min_p": 0.1}),
    ("typical_p = 0.5", {"do_sample": True, "typical_p": 0.5}),
    ("epsilon_cutoff = 0.1", {"do_sample": True, "epsilon_cutoff": 0.1}),
    ("eta_cutoff = 0.1", {"do_sample": True, "eta_cutoff": 0.1}),
    ("prompt_lookup_num_tokens = 3", {"prompt_lookup_num_tokens": 3}),
    ("watermarking_config", {"watermarking_config": {"context_width": 1}, "do_sample": True}),
    ("output_scores = True", {"return_dict_in_generate": True, "output_scores": True}),
    ("output_logits = True", {"return_dict_in_generate": True, "output_logits": True}),
    ("output_hidden_states = True", {"output_hidden_states": True, "return_dict_in_generate": True}),
    ("logits_processor = Same", {"logits_processor": [Same()]}),
    ("logits_processor = TopKLogitsWarper.*each once", {"do_sample": True, "logits_processor": [TopKLogitsWarper(3)]}),
    (
        "logits_processor = TemperatureLogitsWarper.*in the order",
        {"do_sample": True, "top_k": 0, "temperature": 2.0, "logits_processor": [TopPLogitsWarper(0.5)]},
    ),
    (
        "min_tokens_to_keep",
        {"do_sample": True, "top_k": 0, "logits_processor": [TopPLogitsWarper(0.5, min_tokens_to_keep=3)]},
    ),
    ("prefix_allowed_tokens_fn = fewer", {"prefix_allowed_tokens_fn": lambda *_: list(range(24, 28))}),
    ("position_ids", {"position_ids": torch.tensor([[0, 2, 1, 3]])}),
    ("guidance = 0.5", {"guidance_scale": 0.5}),
    ("negative_prompt_ids = 2 rows", {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([NEGATIVE] * 2)}),
]


@pytest.mark.parametrize(("named", "asked"), REFUSED, ids=[name.split()[0] for name, _ in REFUSED])
def test_what_generate_is_asked_and_we_would_ignore_is_refused_by_name(named: str, asked: dict[str, Any]) -> None:
    if function := asked.get("prefix_allowed_tokens_fn"):
        function.__name__ = "fewer"
    with pytest.raises(UsageError, match=named):
        draw(prompts=[PROMPTS[0]] * (3 if "rows" in named else 1), **asked)


def test_an_assistant_is_refused() -> None:
    """transformers 5.0.0 and 5.24.0 do not tell a callable of it (nor of a streamer)."""
    with pytest.raises(UsageError, match="assistant_model = ChameleonForConditionalGeneration is not allowed here"):
        draw(assistant_model=model_of("chameleon"))


def test_a_cache_that_holds_something_is_refused() -> None:
    class Held(transformers.DynamicCache):
        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 3

    loop, ids = bozzetto.generate_fn(GRID, GRID), torch.tensor(PROMPTS[:1])
    with pytest.raises(UsageError, match="cache of 3 tokens"):
        loop(model_of("chameleon"), ids, cache=Held())
    with pytest.raises(UsageError, match="pixel_values = Tensor"):
        loop(model_of("chameleon"), ids, pixel_values=torch.zeros(1))


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": None},
        {"max_new_tokens": 500},
        {"num_beams": 1, "min_new_tokens": 3, "renormalize_logits": True, "remove_invalid_values": True},
        {"logits_processor": [TemperatureLogitsWarper(3.0)]},
        {"prefix_allowed_tokens_fn": lambda *_: list(range(24, 32))},
        {"cache_implementation": "static", "use_cache": False},
    ],
    ids=["no length", "any length", "neutral", "greedy", "prefix", "cache"],
)
def test_what_changes_nothing_is_taken(asked: dict[str, Any]) -> None:
    assert draw(**asked)[0, len(PROMPTS[0]) :].tolist() == wanted("chameleon", 0, LawSettings(1.0, 0.0))


def test_the_law_is_read_where_it_was_given() -> None:
    """Processors may be given as such, with nothing in the configuration."""
    given = [TemperatureLogitsWarper(1.5), TopKLogitsWarper(4), TopPLogitsWarper(0.9)]
    drawn = draw(do_sample=True, top_k=0, logits_processor=given)
    assert drawn[0, len(PROMPTS[0]) :].tolist() == wanted("chameleon", 0, LawSettings(1.0, 1.5, 4, 0.9))


def test_several_sequences_of_a_prompt_are_images_of_their_own() -> None:
    options: dict[str, Any] = {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([NEGATIVE])}
    drawn = draw(do_sample=True, top_k=0, num_return_sequences=3, **options)
    law = LawSettings(2.0)
    assert [row[len(PROMPTS[0]) :] for row in drawn.tolist()] == [wanted("chameleon", 0, law, i) for i in range(3)]


def test_a_dictionary_is_returned_where_it_is_asked_for() -> None:
    made = draw(return_dict_in_generate=True)
    assert torch.equal(made.sequences, draw()) and made.scores is None


@pytest.mark.parametrize("drafter", ["none", "jacobi"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_streamer_gets_the_whole_picture_token_by_token(drafter: str, count: int) -> None:
    shown = Shown()
    ways: dict[str, Any] = {"drafter": drafter, "ending": (5, 6)}
    whole = draw("emu3", [PROMPTS[0]] * count, ways, max_new_tokens=LINES + 2, do_sample=True, streamer=shown)
    prompt, *columns = shown.parts
    assert shown.ended and len(columns) == LINES + 2
    assert torch.equal(torch.cat([prompt, torch.stack(columns, 1)], 1), whole)


def test_the_usual_function_of_an_emu3_is_followed_and_another_one_refused() -> None:
    codes, start = list(range(24, 32)), len(PROMPTS[0])

    def allowed(_: int, seen: Tensor) -> list[Any]:
        return [torch.tensor([32])] if (len(seen) - start) % (GRID + 1) == GRID else codes

    greedy = wanted("emu3", 0, LawSettings(1.0, 0.0))
    assert draw("emu3", prefix_allowed_tokens_fn=allowed)[0, start:].tolist() == greedy
    with pytest.raises(UsageError, match="of token 3 the grid allows 1 words"):
        draw("emu3", prefix_allowed_tokens_fn=lambda _, seen: allowed(_, seen[:-1]) if len(seen) > start else codes)


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("height = 0 is not allowed", {"height": 0}),
        ("width = -1 is not allowed", {"width": -1}),
        ("height = 2.5 is not allowed", {"height": 2.5}),
        ("seed = -1 is not allowed", {"seed": -1}),
        ("drafter = 'eagle' is not allowed here", {"drafter": "eagle", "rule": "block"}),
        ("drafter = 'eagle' is not allowed here", {"drafter": "eagle", "rule": "auto"}),
        ("drafter = 'jacobi:fill=glance' is not allowed here", {"drafter": "jacobi:fill=glance"}),
        ("rule = 'lantern:k=2' is not allowed here: it reads a table", {"rule": "lantern:k=2"}),
        ("it is for continuous tokens", {"rule": "pathwise"}),
        ("unknown drafter 'oracle'", {"drafter": "oracle"}),
    ],
)
def test_what_cannot_work_is_refused_at_once(named: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=named):
        bozzetto.generate_fn(**{"height": GRID, "width": GRID, **options})


def test_methods_that_choose_for_themselves_draw_as_well() -> None:
    ways: dict[str, Any] = {"drafter": "auto", "rule": "auto"}
    assert torch.equal(draw(ways=ways), draw(ways={"drafter": "none", "rule": "lantern:k=2"}))


def test_the_cache_is_called_as_this_transformers_calls_it() -> None:
    """transformers 5.0.0 takes past_key_values, 5.24.0 cache (and the other with a FutureWarning, until 5.40)."""

    def old(inputs_embeds: Any = None, past_key_values: Any = None, **kwargs: Any) -> None: ...
    def new(inputs_embeds: Any = None, cache: Any = None, **kwargs: Any) -> None: ...

    @functools.wraps(new)
    def both(*args: Any, **kwargs: Any) -> None: ...

    assert [cache_argument(forward) for forward in (old, new, both)] == ["past_key_values", "cache", "cache"]


def test_a_chameleon_draws_squares() -> None:
    ids = torch.tensor(PROMPTS[:1])
    with pytest.raises(UsageError, match="draws squares"):
        model_of("chameleon").generate(ids, custom_generate=bozzetto.generate_fn(GRID, GRID + 1))


def test_windows_are_those_of_the_settings_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a matrix unit every row of a pass costs, inside of generate too."""
    monkeypatch.setattr("bozzetto.settings.cheap_rows", lambda: 8)
    target, law = target_of("chameleon"), LawSettings(guidance=2.0)
    batch = _batch(target, GenerateSettings("jacobi", "exact"), law, 8)
    wanted = GenerateSettings("jacobi", "exact", **vars(law)).window_for(8, target.length, "float32")
    assert batch.drafter.max_nodes + 1 == wanted == 2
