import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.models import OptionInfo

import sparsight
from small_runs import SCENES, recipe_values, stage_values
from sparsight import cli
from sparsight.errors import UserError
from sparsight.layouts import PRESETS, Layout
from sparsight.settings.bridges import (
    BRIDGE_KINDS,
    ChainOfSightConfig,
    LinearConfig,
    MlpConfig,
    PixelShuffleConfig,
    ResamplerConfig,
    bridge_settings,
    check_scaling,
)
from sparsight.settings.load import builtin_recipe, load_comparison, load_recipe
from sparsight.settings.recipe import Comparison, LearningRates, Recipe, Stage

RECIPE = """
name: small
vision: efficientnet-lite0
data: {kind: scenes, scenes: 50}
stages:
  - name: pretrain
    bridge: {kind: chain_of_sight, layout: cos-32}
    learning_rate: {bridge: 1.0e-3}
    samples: 100
    batch_size: 16
  - name: finetune
    bridge: {kind: chain_of_sight, layout: "1:16,8:1"}
    learning_rate: {bridge: 1.0e-4, language: 2.0e-5}
    samples: 33
"""


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def stage(**keys):
    return Stage(**({"name": "s", "bridge": LinearConfig(), "learning_rate": {"bridge": 1e-3}, "samples": 10} | keys))


def test_a_recipe_is_read(recipe_file):
    recipe = load_recipe(recipe_file)
    assert [s.name for s in recipe.stages] == ["pretrain", "finetune"]
    assert recipe.stages[0].bridge == ChainOfSightConfig("1:16,4:1")
    assert [s.steps for s in recipe.stages] == [7, 3]  # rounded up: every sample is seen
    assert recipe.stages[1].learning_rate.parts() == {"bridge": 1e-4, "language": 2e-5}
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    "override, message",
    [
        ("vison=x", r"unknown key 'vison' in Recipe; did you mean 'vision'\?"),
        ("stages.finetune.batchsize=2", r"stages\.1: unknown key 'batchsize' in Stage; did you mean 'batch_size'\?"),
        ("stages.0.bridge.layot=cos-32", r"unknown key 'layot' in ChainOfSightConfig; did you mean 'layout'\?"),
        ("data.senes=2", r"unknown key 'senes' in SceneData; did you mean 'scenes'\?"),
        ("stages.0.learning_rate.llm=1", r"unknown key 'llm' in LearningRates. Known keys: vision, bridge, language"),
        ("stages.0.bridge.layout=cos-81", r"stages\.0\.bridge\.chain_of_sight\.layout: unknown layout 'cos-81'"),
        ("stages.0.bridge.layout=1:16,4y4", r"'4y4' is not a scale"),
        ("stages.0.batch_size=many", r"stages\.0\.batch_size: expected a whole number \(given: 'many'\)"),
        ("stages.0.samples=0", r"stages\.0\.samples: expected 1 or more \(given: 0\)"),
        ("stages.1.name=pretrain", r"stages need different names, found \['pretrain', 'pretrain'\]"),
        ("stages=[]", r"stages: expected 1 or more of them, found 0"),
        ("stages.0.proportional_attention=true", r"needs position_layout, and no compressor; found None, None"),
        ("seed", r"override 'seed': expected key=value"),
        ("=1", r"override '=1': expected key=value"),
        ("stages.align.samples=1", r"no item 'align'; there are \['pretrain', 'finetune'\]"),
        ("stages.2.samples=1", r"no item '2'"),
        ("stages=1 2", r"stages: "),
        ("name.first=x", r"'name' is not a mapping, found str"),
        ("name.first.second=x", r"'name' is not a mapping, found 'small'"),
        ("stages.0=x", r"'stages' is not a mapping, found list"),
        ("name='bad: [yaml'x", r"override 'name='bad: \[yaml'x': not valid YAML"),
    ],
)
def test_errors_name_the_place_and_what_was_meant(recipe_file, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file, [override])


def test_overrides_reach_everything(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "seed=3",
            "name=other",
            "stages.pretrain.batch_size=8",
            "stages.1.learning_rate.vision=1e-5",
            "stages.finetune.lora={rank: 4}",
            "data.scenes=200",
            "language.hidden=64",
        ],
    )
    assert (recipe.seed, recipe.name, recipe.data.scenes) == (3, "other", 200)
    assert (recipe.stages[0].batch_size, recipe.stages[1].batch_size) == (8, 16)
    assert recipe.stages[1].learning_rate.parts() == {"vision": 1e-5, "bridge": 1e-4, "language": 2e-5}
    assert recipe.language.hidden == 64 and recipe.stages[1].lora.rank == 4


def test_later_overrides_win(recipe_file):
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe at .*nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")
    for text, message in [
        ("stages: [", r"bad\.yaml: not valid YAML.*line 1"),
        ("- a\n- b", "expected a mapping of keys to values, found list"),
        ("", "found NoneType"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ]:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ValueError, match=r"bad\.yaml: not valid YAML: .*codec"):
        load_recipe(tmp_path / "bad.yaml")


@pytest.mark.parametrize("nested", ["[" * 5000 + "]" * 5000, "{a: " * 3000 + "1" + "}" * 3000])
def test_D12_deeply_nested_yaml_is_told(tmp_path, nested):
    (tmp_path / "deep.yaml").write_text(f"name: {nested}")
    with pytest.raises(ValueError, match=r"deep\.yaml: nested too deeply"):
        load_recipe(tmp_path / "deep.yaml")
    (tmp_path / "flat.yaml").write_text("name: a")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(tmp_path / "flat.yaml", [f"name={nested}"])


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../a", "a\\b", ""])
def test_D12_a_recipe_writes_nowhere_else_by_its_name(name):
    with pytest.raises(ValidationError, match="name"):
        Recipe.model_validate({"name": name, "stages": []})


def test_settings_are_frozen(recipe_file):
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.stages[0].bridge.layout = "1:1"
    with pytest.raises(ValidationError, match="frozen"):
        del recipe.name


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"batch_size": 16, "micro_batch_size": 5}, "stage 's': batch_size 16 is not a multiple of 5"),
        ({"lora": {}}, "stage 's': lora needs learning_rate.language"),
        ({"learning_rate": {"vision": 1e-5}, "cache_features": True}, "cannot be cached while the vision encoder tr"),
        ({"learning_rate": {}}, "nothing trains: give a learning rate to at least one of vision, bridge, language"),
        ({"learning_rate": {"bridge": 0}}, "greater than 0"),
        ({"name": "a/b"}, "pattern"),
        ({"name": ".."}, "pattern"),  # D12: runs/NAME is to lie in runs
        ({"bridge": {"kind": "mpl"}}, "mpl"),
    ],
)
def test_a_stage_that_cannot_be(keys, message):
    with pytest.raises(ValidationError, match=message):
        stage(**keys)


def test_stages_that_can_be():
    assert stage(batch_size=16, micro_batch_size=4).micro_batch_size == 4
    assert stage(lora={}, learning_rate={"language": 1e-4}).lora.rank == 16
    assert stage(cache_features=True).cache_features
    assert LearningRates(language=2.0).parts() == {"language": 2.0}


def test_a_comparison_merges(tmp_path):
    one = {"name": "pretrain", "bridge": {"kind": "linear"}, "learning_rate": {"bridge": 1e-3}, "samples": 10}
    two = one | {"name": "finetune"}
    comparison = Comparison(
        shared={"seed": 5, "data": {"kind": "scenes", "scenes": 7, "seed": 1}, "stages": [one, two]},
        runs={
            "a": {},
            "b": {"data": {"scenes": 9}, "stages": [{"samples": 20}, {"image_size": 64}]},
            "c": {"seed": 6, "name": "ignored", "stages": [one]},
        },
    )
    a, b, c = comparison.recipes()
    assert [r.name for r in (a, b, c)] == ["a", "b", "c"]
    assert (a.seed, b.seed, c.seed) == (5, 5, 6)
    assert (b.data.scenes, b.data.seed) == (9, 1)
    assert [(s.name, s.samples, s.image_size) for s in b.stages] == [("pretrain", 20, None), ("finetune", 10, 64)]
    assert [len(r.stages) for r in (a, b, c)] == [2, 2, 1]
    assert a == Comparison.model_validate(comparison.model_dump()).recipes()[0]  # nothing was changed in place


def test_a_run_may_say_none(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "shared: {language_layers: 3, stages: [{name: s, bridge: {kind: mlp}, learning_rate: {bridge: 1}, samples: 1}]}"
        "\nruns: {a: {}, b: {language_layers: null}}"
    )
    assert [r.language_layers for r in load_comparison(file).recipes()] == [3, None]


def test_comparison_errors_name_the_run(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("runs: {a: {sed: 1}, b: {}}")
    with pytest.raises(ValueError, match=r"runs\.a: recipe: unknown key 'sed' in Recipe; did you mean 'seed'\?"):
        load_comparison(file).recipes()
    with pytest.raises(ValueError, match=r"c\.yaml: recipe: unknown key 'rnus' in Comparison; did you mean 'runs'\?"):
        load_comparison(file, ["rnus=1"])
    file.write_text("runs: {a: {}}")
    with pytest.raises(ValueError, match="runs: expected 2 or more of them, found 1"):
        load_comparison(file)


def test_bridge_settings_from_anything():
    assert bridge_settings("mlp") == MlpConfig()
    assert [bridge_settings(kind).kind for kind in BRIDGE_KINDS] == list(BRIDGE_KINDS)
    assert (
        bridge_settings("cos-80") == bridge_settings("1:16,4:4") == ChainOfSightConfig("cos-80") == ChainOfSightConfig()
    )
    assert bridge_settings({"kind": "resampler", "tokens": 9}) == ResamplerConfig(tokens=9)
    settings = PixelShuffleConfig(factor=3)
    assert bridge_settings(settings) is settings
    assert bridge_settings(settings.model_dump()) == settings
    assert ChainOfSightConfig(Layout.parse("1:2,3:4"), width=32, heads=4).layout == Layout.parse("1:2,3:4")


@pytest.mark.parametrize(
    "value, message",
    [
        ("cos-528", "ambiguous"),
        ("pixel_shufle", "unknown layout 'pixel_shufle'"),
        ({"kind": "mpl"}, "mpl"),
        ({"tokens": 3}, "kind"),
        ({"kind": "pixel_shuffle", "facto": 2}, r"unknown key 'facto' in PixelShuffleConfig; did you mean 'factor'\?"),
        ({"kind": "pixel_shuffle", "factor": 0}, r"factor: expected 1 or more \(given: 0\)"),
        ({"kind": "chain_of_sight", "width": 30, "heads": 4}, "width 30 does not divide by heads 4"),
        (3, "3"),
        (None, "expected a mapping of keys to values"),
    ],
)
def test_bridge_settings_that_cannot_be(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        bridge_settings(value)
    assert not isinstance(caught.value, ValidationError)  # a readable line, not pydantic's page


@pytest.mark.parametrize(
    "settings, map_size, tokens",
    [
        (LinearConfig(), (24, 24), 576),
        (MlpConfig(), (15, 17), 255),
        (PixelShuffleConfig(factor=2), (16, 16), 64),
        (PixelShuffleConfig(factor=2), (15, 17), 8 * 9),
        (PixelShuffleConfig(factor=3), (4, 3), 2),
        (PixelShuffleConfig(factor=1), (4, 3), 12),
        (ResamplerConfig(tokens=64), (24, 24), 64),
        (ChainOfSightConfig("cos-1296"), (32, 32), 1296),
    ],
)
def test_visual_tokens(settings, map_size, tokens):
    assert settings.visual_tokens(map_size) == tokens


@given(st.sampled_from(sorted(PRESETS)), st.tuples(st.integers(16, 64), st.integers(16, 64)))
def test_a_layouts_tokens_do_not_depend_on_the_map(name, map_size):
    assert ChainOfSightConfig(name).visual_tokens(map_size) == Layout.parse(name).tokens


def test_stages_with_data_of_their_own(tmp_path: Path) -> None:
    """Each source goes on where the last stage with the same data left it; scenes are found wherever they stand."""
    own = {"kind": "json", "path": "chat.json"}
    stages = [stage_values("a"), stage_values("b", data=own), stage_values("c"), stage_values("d", data=own)]
    recipe = Recipe.model_validate(recipe_values(tmp_path, stages=stages))
    assert [recipe.samples_before(stage) for stage in recipe.stages] == [0, 0, 16, 16]
    assert [recipe.data_of(stage).kind for stage in recipe.stages] == ["scenes", "json", "scenes", "json"]
    assert [data.kind for data in recipe.all_data()] == ["scenes", "json"]
    assert recipe.scenes() == recipe.data
    only = Recipe.model_validate(recipe_values(tmp_path, data=own, stages=[stage_values("a")]))
    assert only.scenes() is None
    part = {"kind": "mixture", "parts": [{"data": own}, {"data": SCENES}]}
    assert Recipe.model_validate(recipe_values(tmp_path, data=own, stages=[stage_values(data=part)])).scenes()
    with pytest.raises(ValueError, match="stage 'pretrain' names tasks, .* found data of kind 'json'"):
        Recipe.model_validate(recipe_values(tmp_path, stages=[stage_values(data=own, tasks={"caption": 1})]))


def test_F21_scenes_hold_every_task_that_a_stage_trains(tmp_path: Path) -> None:
    def tasks(data: dict, *stages: dict) -> dict | None:
        each = [stage_values(str(number), **own) for number, own in enumerate(stages)]
        found = Recipe.model_validate(recipe_values(tmp_path, data=data, stages=each)).scenes()
        return found and found.tasks

    few = SCENES | {"tasks": {"count": 5, "naming": 1, "text": 0}}
    assert tasks(SCENES, {}, {"tasks": {"caption": 1}}) is None  # all
    assert set(tasks(few, {})) == {"count", "naming"}
    assert set(tasks(few, {"tasks": {"caption": 1}}, {})) == {"caption", "count", "naming"}
    assert set(tasks(few, {"tasks": {"caption": 1}})) == {"caption"}
    assert tasks({"kind": "json", "path": "x"}, {}, {"data": few}) == {"count": 5, "naming": 1}


@pytest.mark.parametrize("name", ["few-tokens", "scale-settled", "scale"])
def test_presets_take_the_place_of_bridges_and_methods(tmp_path: Path, name: str) -> None:
    """Few tokens early, the recipe's own sizes of the bridge, and overrides on top."""
    wide = {"kind": "resampler", "tokens": 336, "width": 64, "heads": 2}
    stages = [stage_values("a", bridge=wide, compressor={"keep": 0.5}), stage_values("b", bridge="mlp")]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_values(tmp_path, stages=stages) | {"vision": "x"}))
    recipe = load_recipe(file, ["stages.a.bridge.query_std=3", "stages.b.skipper.alpha=0.1"], name)
    early, *settle, late = recipe.stages
    assert bool(settle) == (name == "scale-settled")
    if settle:  # most of the last stage's samples come before scaling
        assert [stage.name for stage in settle] == ["settle"] and settle[0].proportional_attention
        assert settle[0].bridge.scales == early.bridge.scales and settle[0].learning_rate == late.learning_rate
        assert settle[0].samples == round(0.75 * stages[1]["samples"])
    assert sum(stage.samples for stage in (*settle, late)) == stages[1]["samples"]
    tokens = early.bridge.scales.tokens, late.bridge.scales.tokens
    assert tokens == (24, 24) if name == "few-tokens" else (32, 336)
    assert (early.position_layout is None) == (name == "few-tokens") and late.position_layout is None
    assert (early.bridge.width, early.bridge.heads, early.bridge.query_std) == (64, 2, 3)
    assert late.skipper is not None and late.skipper.alpha == 0.1  # which the preset has switched off
    assert early.compressor is None and late.bridge.width == 64
    early.bridge.scales.source_scales(late.bridge.scales)  # can be scaled


def preset_file(folder: Path) -> Path:
    file = folder / "recipe.yaml"
    stages = [stage_values("a"), stage_values("b", bridge="mlp", samples=10_000)]
    file.write_text(yaml.safe_dump(recipe_values(folder, stages=stages) | {"vision": "x"}))
    return file


@pytest.mark.parametrize("place", ["b", "1"])
def test_F14_a_preset_splits_what_overrides_have_left(tmp_path: Path, place: str) -> None:
    """By its name or its number in the recipe as it is written; also what the settling stage takes of the last one."""
    overrides = [f"stages.{place}.{value}" for value in ("samples=16", "learning_rate.language=5e-4", "weight_decay=1")]
    _, settle, late = load_recipe(preset_file(tmp_path), overrides, "scale-settled").stages
    assert (settle.name, settle.samples, late.samples) == ("settle", 12, 4)
    assert all(each.learning_rate.language == 5e-4 and each.weight_decay == 1 for each in (settle, late))


def test_F14_overrides_of_a_presets_own_keys_and_stage_come_after_it(tmp_path: Path) -> None:
    own = ["stages.settle.samples=7", "stages.settle.schedule=linear", "stages.settle.proportional_attention=false"]
    own += ["stages.b.bridge.query_std=2", "stages.b.bridge.layout=1:16,8:1", "stages.b.skipper.alpha=0.1", "seed=3"]
    recipe = load_recipe(preset_file(tmp_path), [*own, "stages.b.name=late", "stages.late.samples=16"], "scale-settled")
    _, settle, late = recipe.stages
    assert (settle.samples, settle.schedule, settle.proportional_attention) == (7, "linear", False)
    assert (late.name, late.samples, late.skipper.alpha, late.bridge.query_std) == ("late", 4, 0.1, 2)
    assert (late.bridge.scales, recipe.seed) == (Layout.parse("1:16,8:1"), 3) and settle.bridge.scales.tokens == 32
    with pytest.raises(ValueError, match=r"no item 'settle'; there are \['a', 'b'\]"):
        load_recipe(preset_file(tmp_path), ["stages.settle.samples=7"], "few-tokens")
    with pytest.raises(ValueError, match=r"override 'stages.b.samples.x=1': 'stages.b.samples' is not a mapping"):
        load_recipe(preset_file(tmp_path), ["stages.b.samples.x=1"], "few-tokens")


def test_F14_overrides_may_give_the_stages_themselves(tmp_path: Path) -> None:
    stages = "[{name: a, bridge: {kind: mlp}, learning_rate: {bridge: 1}, samples: 4}, {name: b, bridge: {kind: mlp}, "
    stages += "learning_rate: {bridge: 1}, samples: 8}]"
    recipe = load_recipe(preset_file(tmp_path), [f"stages={stages}", "stages.b.samples=16"], "scale-settled")
    assert [(each.name, each.samples, each.bridge.scales.tokens) for each in recipe.stages] == [
        ("a", 4, 32),
        ("settle", 12, 32),
        ("b", 4, 336),
    ]


def test_presets_that_do_not_fit_are_told(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_values(tmp_path, stages=[stage_values()])))
    with pytest.raises(ValueError, match="--preset best: expected one of few-tokens, scale-settled, scale"):
        load_recipe(file, None, "best")
    with pytest.raises(ValueError, match="two stages or more"):
        load_recipe(file, None, "few-tokens")


@pytest.mark.parametrize("old, new", [("fast", "few-tokens"), ("balanced", "scale-settled"), ("quality", "scale")])
def test_F25_old_names_of_presets_are_the_new_ones_with_a_warning(tmp_path: Path, old: str, new: str) -> None:
    """Their order, fast to quality, was none of the figures'."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_values(tmp_path, stages=[stage_values("a"), stage_values("b")])))
    with pytest.warns(FutureWarning, match=f"--preset {old} is now called {new}; the old name goes with the next"):
        assert load_recipe(file, None, old) == load_recipe(file, None, new)


def test_F25_the_help_names_every_preset() -> None:
    presets = yaml.safe_load(builtin_recipe("presets.yaml").read_text(encoding="utf-8"))
    (option,) = (each for each in get_args(cli.Preset)[1:] if isinstance(each, OptionInfo))
    names = re.findall(r"[a-z-]+", option.help.partition(":")[0].replace(" or ", ", "))
    assert names == list(presets)


COS = {"kind": "chain_of_sight", "width": 32, "heads": 2}


@pytest.mark.parametrize(
    "first, second, message",
    [
        (COS | {"layout": "cos-80"}, COS | {"layout": "cos-336-from-32"}, "has no source in"),
        (COS | {"layout": "cos-32"}, COS | {"layout": "cos-32", "width": 64}, r"these differ .*'width': \[32, 64"),
        (COS | {"layout": "cos-32"}, COS | {"layout": "cos-32", "order": "fine_to_coarse"}, "differ .*'order'"),
        ({"kind": "mlp"}, COS, "kind mlp cannot become one of kind chain_of_sight"),
        (COS, {"kind": "resampler", "tokens": 16, "width": 32, "heads": 2}, "cannot become one of kind resampler"),
        (COS, {"kind": "pixel_shuffle"}, "kind chain_of_sight cannot become one of kind pixel_shuffle"),
    ],
)  # fmt: skip
def test_stages_that_cannot_follow_each_other_are_told_before_any_trains(tmp_path, first, second, message) -> None:
    stages = [stage_values("pretrain", bridge=first), stage_values("finetune", bridge=second)]
    with pytest.raises(ValueError, match=f"stages 'pretrain' -> 'finetune': .*({message})"):
        Recipe.model_validate(recipe_values(tmp_path, stages=stages))
    same = [stage | {"bridge": first} for stage in stages]
    assert len(Recipe.model_validate(recipe_values(tmp_path, stages=same)).stages) == 2


def test_names_that_comparisons_use_are_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a stage cannot be named \['total'\]"):
        Recipe.model_validate(recipe_values(tmp_path, stages=[stage_values("total")]))
    held_out = {"mean": {"data": {"path": "x.json"}}}
    with pytest.raises(ValueError, match="'mean' is the mean of all scores"):
        Recipe.model_validate(recipe_values(tmp_path, evaluation={"held_out": held_out}))


def test_what_was_saved_is_read_again(tmp_path: Path) -> None:
    """Defaults are written, too: with batch_tokens, a batch_size that nobody gave."""
    recipe = Recipe.model_validate(recipe_values(tmp_path, stages=[_by_tokens()]))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    for key in ({"batch_size": 8}, {"pack_length": 64, "packing": True}):
        with pytest.raises(ValueError, match="batch_tokens settles what batch_size and pack_length do"):
            Recipe.model_validate(recipe_values(tmp_path, stages=[_by_tokens() | key]))


def _by_tokens() -> dict[str, object]:
    return {key: value for key, value in stage_values().items() if key != "batch_size"} | {"batch_tokens": 400}


def test_positions_are_those_of_coarse_to_fine(tmp_path: Path) -> None:
    bridge = COS | {"layout": "cos-32", "order": "fine_to_coarse"}
    with pytest.raises(ValueError, match="position_layout needs order: coarse_to_fine; found fine_to_coarse"):
        Recipe.model_validate(
            recipe_values(tmp_path, stages=[stage_values(bridge=bridge, position_layout="cos-336-from-32")])
        )


def test_one_kind_of_file_is_not_taken_for_the_other(tmp_path: Path) -> None:
    one, several = tmp_path / "one.yaml", tmp_path / "several.yaml"
    one.write_text(yaml.safe_dump(recipe_values(tmp_path)))
    several.write_text(yaml.safe_dump({"runs": {"a": {}, "b": {}}}))
    with pytest.raises(ValueError, match="several.yaml compares runs; it is for: sparsight demo --recipe"):
        load_recipe(several)
    with pytest.raises(ValueError, match="one.yaml is the recipe of one run; it is for: sparsight train"):
        load_comparison(one)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": 3}, r"stages: expected a list \(given: 3\)"),
        ({"stages": [stage_values(bridge=3)]}, r"stages.0.bridge: expected a mapping .* \(given: 3\)"),
        ({"stages": [stage_values(bridge={"kind": "mpl"})]}, r"kind: expected one of 'linear', 'mlp'.*given: 'mpl'"),
        ({"seeds": 1}, r"unknown key 'seeds' in Recipe; did you mean 'seed'\? Known keys: name"),
        ({"foo": 1}, r"unknown key 'foo' in Recipe\. Known keys: name"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_the_recipes_words(tmp_path: Path, changes: dict, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_values("encoder", **changes)))
    with pytest.raises(ValueError, match=message):
        load_recipe(file)


@pytest.mark.parametrize("bridge", ["cos-32", "1:16,4:1", "mlp", "paper", "linear"])
def test_F26_a_recipe_takes_a_bridge_by_its_name_as_python_does(recipe_file: Path, bridge: str) -> None:
    values = yaml.safe_load(recipe_file.read_text())
    for stage in values["stages"]:
        stage["bridge"] = bridge
        stage.pop("position_layout", None)
    recipe_file.write_text(yaml.safe_dump(values | {"stages": values["stages"][:1]}))
    assert load_recipe(recipe_file).stages[0].bridge == bridge_settings(bridge)
    read = load_recipe(recipe_file, ["stages.0.bridge=cos-80", "stages.0.bridge.width=64"]).stages[0].bridge
    assert read == ChainOfSightConfig("cos-80", width=64)
    with pytest.raises(ValueError, match=r"stages\.0\.bridge.*unknown layout 'cos-81'; did you mean 'cos-80'"):
        load_recipe(recipe_file, ["stages.0.bridge=cos-81"])


def test_F26_the_layout_within_reach_is_named() -> None:
    message = "no source in '1:16,4:1'.*From '1:16,4:1' there are cos-336-from-32, cos-528-from-32$"
    with pytest.raises(ValueError, match=message):
        check_scaling(ChainOfSightConfig("cos-32"), ChainOfSightConfig("cos-336"))
    with pytest.raises(ValueError, match="16 queries per window$"):
        check_scaling(ChainOfSightConfig("1:3"), ChainOfSightConfig("cos-336"))


PYDANTICS = "Input should|should have|Field required|Input is|validation|Value error|pydantic"


@pytest.mark.parametrize(
    "override",
    [
        *("stages=[]", "stages=x", "stages.0.samples=0", "stages.0.samples=x", "stages.0.samples=1.5"),
        *("stages.0.samples=null", "stages.0.warmup=2", "stages.0.warmup=x", "stages.0.weight_decay=-1"),
        *("stages.0.max_grad_norm=0", "stages.0.packing=x", "stages.0.schedule=x", "stages.0.bridge=3"),
        *("stages.0.bridge={}", "stages.0.name=a b", "stages.0.lora.dropout=1", "vision=3", "vision=null"),
        *("precision=x", "report_to=x", "report_to=[x]", "vision_levels=[x]", "data={}", "data.kind=x", "data.tasks=3"),
        *(
            "data.digits=[1]",
            "data.digits=[1,2,3]",
            "data={kind: json}",
            "evaluation=3",
            "language=[1]",
            "language=null",
        ),
        *("data={kind: mixture, parts: []}", "data={kind: mixture, parts: [{data: {kind: scenes}, weight: .inf}]}"),
        *("stages.0.skipper={protected: [1]}", "stages.0.skipper.importance=[x]", "evaluation.held_out=[]"),
    ],
)
def test_F26_no_sentence_of_pydantic_reaches_the_user(recipe_file: Path, override: str) -> None:
    with pytest.raises(ValueError, match="expected") as told:
        load_recipe(recipe_file, [override])
    assert not re.search(PYDANTICS, str(told.value)), told.value


OLD_NAMES = {
    "ChainOfSight": "ChainOfSightConfig",
    "Resampler": "ResamplerConfig",
    "Linear": "LinearConfig",
    "Mlp": "MlpConfig",
    "PixelShuffle": "PixelShuffleConfig",
    "VisualTokenCompressor": "CompressorConfig",
    "LayerSkipper": "SkipperConfig",
}


@pytest.mark.parametrize("old, new", OLD_NAMES.items())
def test_old_public_names_warn_and_are_the_new_ones(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=f"{old}.* is now called .*{new}"):
        assert getattr(sparsight, old) is getattr(sparsight, new)


def test_old_keys_warn_and_mean_the_new_ones(recipe_file: Path, tmp_path: Path) -> None:
    """In the file, as overrides, and under a preset, which takes the place of some."""
    values = yaml.safe_load(recipe_file.read_text())
    new = load_recipe(recipe_file, ["stages.0.conversation={supervised: 7}", "stages.0.skipper={schedule: rising}"])
    values["stages"][0] |= {"conversation": {"learnt": 7}, "skipper": {"course": "rising"}}
    old_file = tmp_path / "old.yaml"
    old_file.write_text(yaml.safe_dump(values))
    with pytest.warns(FutureWarning, match="'learnt' is now called 'supervised'"):
        assert load_recipe(old_file) == new
    override = ["stages.0.bridge=cos-32", "stages.0.places_of=cos-336-from-32"]
    with pytest.warns(FutureWarning, match="'places_of' is now called 'position_layout'"):
        found = load_recipe(recipe_file, override).stages[0].position_layout
    assert found == Layout.parse("cos-336-from-32")
    keys = {key: f"stages.pretrain.{key}=cos-528-from-32" for key in ("position_layout", "places_of")}
    late = "stages.finetune.bridge.layout=cos-528-from-32"
    new = load_recipe(recipe_file, [keys["position_layout"], late], "scale")
    assert str(new.stages[0].position_layout) == "1:16,4:16,16:1"
    with pytest.warns(FutureWarning, match="'places_of' is now called 'position_layout'"):
        assert load_recipe(recipe_file, [keys["places_of"], late], "scale") == new
    values["stages"][0] |= {"places_of": "cos-80", "position_layout": "cos-80"}
    old_file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="has both 'position_layout' and 'places_of', its old name"):
        load_recipe(old_file)


def test_scores_of_scenes_are_for_recipes_of_scenes(tmp_path: Path, recipe_file: Path) -> None:
    """Own data are asked nothing about embedded scenes, unless the recipe says so."""
    values = yaml.safe_load(recipe_file.read_text()) | {"data": {"kind": "json", "path": "data.json"}}
    values.pop("evaluation", None)
    for stage in values["stages"]:
        stage.pop("tasks", None)
    assert Recipe.model_validate(values).evaluation.kind == "none"
    assert Recipe.model_validate(values | {"evaluation": {"kind": "scenes"}}).evaluation.kind == "scenes"
    assert Recipe.model_validate(values | {"data": {"kind": "scenes"}}).evaluation.kind == "scenes"
    again = Recipe.model_validate(Recipe.model_validate(values).model_dump(mode="json"))
    assert again == Recipe.model_validate(values)


def test_a_renamed_key_is_told_once_and_readably_in_the_terminal(recipe_file: Path) -> None:
    recipe_file.write_text(
        recipe_file.read_text().replace("    samples:", "    conversation: {learnt: 9}\n    samples:")
    )
    code = f"import sys; from sparsight import cli; sys.argv[1:] = ['plan', {str(recipe_file)!r}]; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    told = "warning: 'learnt' is now called 'supervised'; the old name goes with the next release\n"
    assert (done.returncode, done.stderr) == (0, told)
